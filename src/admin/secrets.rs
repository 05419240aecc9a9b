//! What of a config must not be shown.

use serde_json::Value;

/// What stands in place of a secret.
const HIDDEN: &str = "***";

/// Hides user name and password of every address in any text of a JSON value. The config holds no other secrets: keys are
/// named by their paths.
pub(super) fn hide(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some(hidden) = without_user(text) {
                *text = hidden;
            }
        }
        Value::Array(values) => values.iter_mut().for_each(hide),
        Value::Object(fields) => fields.values_mut().for_each(hide),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// `https://user:password@host/path` as `https://***@host/path`; none if there is nothing to hide.
fn without_user(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let (authority, path) = match rest.find(['/', '?', '#']) {
        Some(end) => rest.split_at_checked(end)?,
        None => (rest, ""),
    };
    let (_, host) = authority.rsplit_once('@')?;
    Some(format!("{scheme}://{HIDDEN}@{host}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_addresses_are_hidden_wherever_they_are() {
        let mut value = serde_json::json!({
            "a": ["https://user:p@ss@host.example/bundle?x=@y", { "b": "https://token@host.example" }],
            "kept": ["spiffe://td.example/a", "https://host.example/@me", "user@host", "unix:///run/a@b.sock", 1, null],
        });
        hide(&mut value);
        assert_eq!(
            value,
            serde_json::json!({
                "a": ["https://***@host.example/bundle?x=@y", { "b": "https://***@host.example" }],
                "kept": ["spiffe://td.example/a", "https://host.example/@me", "user@host", "unix:///run/a@b.sock", 1, null],
            })
        );
    }
}
