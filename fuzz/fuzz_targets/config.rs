//! Whatever a file holds, the answer is a config or lines that each name the file; and a config that is written down
//! reads back as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::config::{LoadOptions, parse_with};

fuzz_target!(|text: &str| {
    let options = LoadOptions { endpoint: None, identity_optional: true };
    match parse_with(text, "f.yaml", &options) {
        Ok(loaded) => {
            let written = serde_json::to_string(&loaded.config).expect("a config can be written");
            let again = parse_with(&written, "written", &options).expect("what was written is accepted");
            assert_eq!(again.config, loaded.config);
        }
        Err(errors) => {
            for line in errors.to_string().lines() {
                assert!(line.starts_with("f.yaml:") && !line.chars().any(char::is_control));
            }
        }
    }
});
