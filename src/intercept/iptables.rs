//! Rules by the programs iptables-restore and ip6tables-restore, for kernels without nf_tables.
//!
//! In: a [`Ruleset`]. Out: chains of ours and a jump to each, put in front once. What is there is read from the save program.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::iptables_text::{PREFIX, Present, built_in, name_of, table_of, text};
use super::rules::{Chain, Family, Ruleset};
use super::{Error, nftables};

/// How long a program may take, the wait for another one's lock included.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is read of a program's output at most, in bytes.
const OUTPUT: u64 = 16 * 1024 * 1024;
/// The variants by preference: a kernel without nf_tables has only the first.
const VARIANTS: [&str; 2] = ["-legacy", ""];

/// Puts these rules in place of those of ours that are there.
///
/// # Errors
/// Why it could not.
pub(super) fn apply(ruleset: &Ruleset) -> Result<(), Error> {
    let mut variant = None;
    for name in VARIANTS {
        match save(Family::V4, name) {
            Err(Failed::Missing) => {}
            Err(Failed::Other(why)) => return Err(Error::new(why)),
            Ok(_) => {
                variant = Some(name);
                break;
            }
        }
    }
    let variant = variant.ok_or_else(|| {
        Error::new("neither iptables-legacy-restore nor iptables-restore is there; install the package iptables")
    })?;
    for family in families() {
        let saved = save(family, variant)?;
        restore(family, variant, &text(ruleset, family, &present(&saved)))?;
    }
    Ok(())
}

/// Takes away all that is ours. That there is nothing is fine.
///
/// # Errors
/// Why it could not.
pub(super) fn remove() -> Result<(), Error> {
    if !may_be_there() {
        return Ok(());
    }
    let nothing = Ruleset { timeouts: Vec::new(), chains: Vec::new(), routing: None };
    for variant in VARIANTS {
        for family in families() {
            let present = match save(family, variant) {
                Ok(saved) => present(&saved),
                Err(Failed::Missing) => continue,
                Err(Failed::Other(why)) => return Err(Error::new(why)),
            };
            if present != Present::default() {
                restore(family, variant, &text(&nothing, family, &present))?;
            }
        }
    }
    Ok(())
}

/// What is missing or different, a line each; none if nothing of ours is there.
///
/// # Errors
/// Why it cannot be read.
pub(super) fn differences(ruleset: &Ruleset) -> Result<Option<Vec<String>>, Error> {
    if !may_be_there() {
        return Ok(None);
    }
    let mut all = None;
    for variant in VARIANTS {
        let mut differences = Vec::new();
        let mut there = false;
        for family in families() {
            let saved = match save(family, variant) {
                Ok(saved) => saved,
                Err(Failed::Missing) => continue,
                Err(Failed::Other(why)) => return Err(Error::new(why)),
            };
            there |= present(&saved) != Present::default();
            differences.extend(compare(ruleset, family, &saved));
        }
        if there {
            all = Some(differences);
            break;
        }
    }
    Ok(all)
}

/// Compares what decides, rule by rule; the rest each version of the program says in its own way.
fn compare(ruleset: &Ruleset, family: Family, saved: &str) -> Vec<String> {
    let wanted = text(ruleset, family, &Present::default());
    let mut differences = Vec::new();
    for chain in &ruleset.chains {
        let (table, name) = (table_of(chain), name_of(chain));
        if essence(&wanted, table, &name) != essence(saved, table, &name) {
            differences.push(format!("chain {name} of table {table} ({family:?}) is another"));
        }
        if let Some(from) = built_in(chain)
            && !jumps_first(saved, chain, from)
        {
            differences
                .push(format!("chain {from} of table {table} ({family:?}) does not begin with a jump to {name}"));
        }
    }
    differences
}

/// What is compared of a rule: flags that are written alike by whoever saves, and how many values each takes.
const DECIDING: [(&str, usize); 23] = [
    ("-p", 1),
    ("-s", 1),
    ("-d", 1),
    ("-i", 1),
    ("-o", 1),
    ("-j", 1),
    ("-g", 1),
    ("--sport", 1),
    ("--dport", 1),
    ("--tcp-flags", 2),
    ("--socket-exists", 0),
    ("--uid-owner", 1),
    ("--gid-owner", 1),
    ("--mark", 1),
    ("--dscp", 1),
    ("--ctstate", 1),
    ("--ctdir", 1),
    ("--dst-type", 1),
    ("--set-mark", 1),
    ("--to-ports", 1),
    ("--on-port", 1),
    ("--tproxy-mark", 1),
    ("--reject-with", 1),
];
/// Modules that decide by being named, or that share their flag with another one.
const MODULES: [&str; 3] = ["socket", "mark", "connmark"];

/// The rules of a chain as sorted flags with their values. A negation stays in front of its flag.
fn essence(saved: &str, table: &str, chain: &str) -> Vec<Vec<String>> {
    lines_of(saved, table, chain)
        .map(|line| {
            // Comments are quoted, and in them nothing decides.
            let plain: String = line.split('"').step_by(2).collect();
            let mut parts = deciding(&plain);
            parts.sort_unstable();
            parts
        })
        .collect()
}

fn deciding(line: &str) -> Vec<String> {
    let mut words = line.split_ascii_whitespace();
    let (mut parts, mut negation) = (Vec::new(), "");
    while let Some(word) = words.next() {
        // Marks are saved with their mask. No rule of ours has another one than all bits.
        let flag = if word == "--set-xmark" { "--set-mark" } else { word };
        if flag == "-m" {
            parts.extend(words.next().filter(|module| MODULES.contains(module)).map(|module| format!("-m {module}")));
        } else if let Some((_, values)) = DECIDING.iter().find(|(known, _)| *known == flag) {
            let values = words.by_ref().take(*values).map(|value| {
                let short = ["/32", "/128", "/0xffffffff"].iter().find_map(|whole| value.strip_suffix(whole));
                format!(" {}", short.unwrap_or(value))
            });
            parts.push(format!("{negation}{flag}{}", values.collect::<String>()));
        }
        negation = if word == "!" { "! " } else { "" };
    }
    parts
}

fn jumps_first(saved: &str, chain: &Chain, from: &str) -> bool {
    lines_of(saved, table_of(chain), from).next().is_some_and(|line| line.ends_with(&format!(" -j {}", name_of(chain))))
}

/// The rules of a chain in what a save program has written.
fn lines_of<'a>(saved: &'a str, table: &'a str, chain: &'a str) -> impl Iterator<Item = &'a str> {
    let mut current = "";
    saved.lines().filter(move |line| {
        if let Some(name) = line.strip_prefix('*') {
            current = name;
        }
        current == table && line.strip_prefix("-A ").and_then(|rule| rule.split(' ').next()) == Some(chain)
    })
}

fn present(saved: &str) -> Present {
    let (mut found, mut table) = (Present::default(), "");
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':').and_then(|chain| chain.split(' ').next()) {
            if chain.starts_with(PREFIX) {
                found.chains.insert((table.to_owned(), chain.to_owned()));
            }
        } else if let ["-A", from, "-j", to] = line.split(' ').collect::<Vec<_>>().as_slice()
            && to.starts_with(PREFIX)
            && !from.starts_with(PREFIX)
        {
            found.jumps.insert((table.to_owned(), (*from).to_owned(), (*to).to_owned()));
        }
    }
    found
}

/// Those that the kernel speaks: without IPv6 there is nothing to be captured of it, and ip6tables fails.
fn families() -> impl Iterator<Item = Family> {
    let v6 = Path::new("/proc/thread-self/net/if_inet6").exists();
    Family::BOTH.into_iter().filter(move |family| *family == Family::V4 || v6)
}

/// Whether iptables has been used here at all. The programs take longer than all the rest.
fn may_be_there() -> bool {
    let used = |file: &str| {
        std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).is_ok_and(|tables| !tables.trim().is_empty())
    };
    used("ip_tables_names") || used("ip6_tables_names") || nftables::has_chain_like(PREFIX)
}

#[derive(Debug)]
enum Failed {
    /// The program is not installed.
    Missing,
    Other(String),
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Missing => Self::new("ip6tables is not there, although iptables is; install the package iptables"),
            Failed::Other(why) => Self::new(why),
        }
    }
}

fn program(family: Family, variant: &str, verb: &str) -> String {
    let of = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    format!("{of}{variant}-{verb}")
}

fn save(family: Family, variant: &str) -> Result<String, Failed> {
    run(&program(family, variant, "save"), &[], "")
}

fn restore(family: Family, variant: &str, input: &str) -> Result<(), Failed> {
    run(&program(family, variant, "restore"), &["--noflush", "--wait", "5"], input).map(|_| ())
}

/// Runs a program to its end and returns what it has written.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, Failed> {
    let deadline = Instant::now() + PATIENCE;
    let piped = |command: &mut Command| {
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let mut child = piped(&mut Command::new(program)).map_err(|why| match why.kind() {
        std::io::ErrorKind::NotFound => Failed::Missing,
        _ => Failed::Other(format!("cannot start {program}: {why}")),
    })?;
    let (tell, told) = mpsc::channel();
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = input.as_bytes().to_vec();
    // Each pipe has a thread, or one that is full would stop the others. They end with the program.
    std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(&input)));
    let errors = std::thread::spawn(move || read(stderr));
    std::thread::spawn(move || tell.send(read(stdout)));
    let Ok(output) = told.recv_timeout(PATIENCE) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Failed::Other(format!(
            "{program} did not end within {} seconds and was stopped",
            PATIENCE.as_secs()
        )));
    };
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::park_timeout(Duration::from_millis(1)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Failed::Other(format!("{program} did not end and was stopped")));
            }
        }
    };
    if status.success() {
        return Ok(output);
    }
    let errors = errors.join().unwrap_or_default();
    let said: Vec<&str> = errors.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    Err(Failed::Other(format!("{program}: {status}: {}", said.join("; "))))
}

fn read(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What was read before an error is of use still.
        let _ = pipe.take(OUTPUT).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
