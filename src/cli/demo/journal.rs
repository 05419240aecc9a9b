//! The sidecars' own log: the latest lines about requests are kept for the story, and all lines go into a file where one is
//! wanted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

/// Lines that are kept.
const KEPT: usize = 64;

/// Takes JSON lines, one with each write. Clones are the same journal.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal(Arc<Mutex<Pages>>);

#[derive(Debug, Default)]
struct Pages {
    file: Option<File>,
    lines: VecDeque<Vec<u8>>,
}

impl Journal {
    /// Becomes the log of this process.
    ///
    /// # Errors
    /// There is a log already.
    pub(super) fn start(file: Option<File>) -> Result<Self, tracing::subscriber::SetGlobalDefaultError> {
        let journal = Self(Arc::new(Mutex::new(Pages { file, lines: VecDeque::new() })));
        let writer = journal.clone();
        let log = tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || writer.clone()).finish();
        tracing::subscriber::set_global_default(log)?;
        Ok(journal)
    }

    /// What is written of the newest request to this listener, in this direction and on this path as it was judged.
    pub(super) fn request(&self, listener: &str, direction: &str, path: &str) -> Option<Value> {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.lines.iter().rev().find_map(|line| {
            let line: Value = serde_json::from_slice(line).ok()?;
            let fits = [("listener", listener), ("direction", direction), ("path", path)];
            fits.iter().all(|(key, value)| line.get(*key).is_some_and(|found| found == value)).then_some(line)
        })
    }
}

impl Write for Journal {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if memchr::memmem::find(line, b"\"path\":").is_some() {
            if pages.lines.len() == KEPT {
                pages.lines.pop_front();
            }
            pages.lines.push_back(line.to_vec());
        }
        if let Some(file) = &mut pages.file {
            file.write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_line_of_a_request_is_found_and_few_are_kept() {
        let mut journal = Journal::default();
        let mut wrote = |path: &str, number: usize| {
            let line = serde_json::json!({ "listener": "api", "direction": "inbound", "path": path, "n": number });
            journal.write_all((line.to_string() + "\n").as_bytes()).unwrap();
        };
        wrote("/old", 0);
        (0..KEPT).for_each(|number| wrote(if number % 2 == 0 { "/even" } else { "/odd" }, number));
        journal.write_all(b"{\"listener\":\"api\",\"direction\":\"inbound\"}\n").unwrap();
        assert_eq!(journal.request("api", "inbound", "/even").unwrap()["n"], KEPT - 2);
        assert_eq!(journal.request("api", "inbound", "/odd").unwrap()["n"], KEPT - 1);
        assert_eq!(journal.request("api", "inbound", "/old"), None);
        assert_eq!(journal.request("api", "outbound", "/odd"), None);
        assert_eq!(journal.0.lock().unwrap().lines.len(), KEPT);
    }
}
