//! The client: curl as it is, which knows nothing of proxies, certificates or rules.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::super::workloads::{Tally, pause};
use super::pods::{APPLICATION, Pod};

/// How long one request may take, in seconds.
const PATIENCE: &str = "5";

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// An answer.
    Answer { status: u16, body: String },
    /// None; what curl says of it.
    Nothing(String),
}

impl Got {
    /// The body of a 200.
    pub(super) fn body(&self) -> Option<&str> {
        match self {
            Self::Answer { status: 200, body } => Some(body),
            _ => None,
        }
    }
}

/// Where curl is.
#[derive(Clone, Debug)]
pub(super) struct Curl(PathBuf);

impl Curl {
    /// The first in PATH.
    pub(super) fn find() -> Option<Self> {
        Self::find_in(&std::env::var_os("PATH")?)
    }

    fn find_in(path: &OsStr) -> Option<Self> {
        let runs = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        std::env::split_paths(path)
            .map(|folder| folder.join("curl"))
            .find(|path| path.is_absolute() && runs(path))
            .map(Self)
    }

    /// Has an application of a pod ask for this.
    pub(super) async fn ask(&self, pod: &Pod, url: &str) -> io::Result<Got> {
        let mut command = Command::new(&self.0);
        // The answer, then a line with its status.
        command.args(["--silent", "--show-error", "--max-time", PATIENCE, "--write-out", "\n%{http_code}", url]);
        // What the environment says of proxies is not for the demo.
        command.env_clear().current_dir("/").uid(APPLICATION).gid(APPLICATION);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = pod.run(move || command.spawn()).await?;
        let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        let text = String::from_utf8_lossy(&output.stdout);
        let (body, status) = text.rsplit_once('\n').unwrap_or_default();
        Ok(match status.parse() {
            Ok(status) if output.status.success() => Got::Answer { status, body: body.trim_end().to_owned() },
            _ => Got::Nothing(in_short(&String::from_utf8_lossy(&output.stderr), output.status.code())),
        })
    }
}

/// What curl says, without its name and the address, which everybody knows.
fn in_short(said: &str, code: Option<i32>) -> String {
    let code = code.map_or("killed".into(), |code| code.to_string());
    let said = said.trim().rsplit([':', ')']).next().unwrap_or_default().trim();
    let said = match said {
        "Couldn't connect to server" => "refused",
        other => other.trim_start_matches("Connection ").trim_end_matches(" from server"),
    };
    format!("({code}) {}", said.to_lowercase()).trim_end().to_owned()
}

/// Applications that ask all the time, one for each address. Ends when dropped.
#[derive(Debug)]
pub(super) struct Traffic {
    /// What came of it.
    pub(super) tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Traffic {
    /// Begins to ask for these; `expected` is in every answer.
    pub(super) fn start(curl: &Curl, pod: &Arc<Pod>, urls: impl IntoIterator<Item = String>, expected: &str) -> Self {
        let tally = Arc::<Tally>::default();
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for url in urls {
            let (curl, pod, expected) = (curl.clone(), Arc::clone(pod), expected.to_owned());
            let (tally, mut stopped) = (Arc::clone(&tally), stopped.clone());
            tasks.spawn(async move {
                while !pause(&mut stopped).await {
                    match curl.ask(&pod, &url).await {
                        Ok(Got::Answer { status: 200, body }) if body.contains(&expected) => tally.answered(),
                        Ok(other) => tally.failed("another answer", &io::Error::other(format!("{other:?}"))),
                        Err(error) => tally.failed("no curl", &error),
                    }
                }
            });
        }
        Self { tally, stop, tasks }
    }

    /// Lets every request finish.
    pub(super) async fn stop(&mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_program_of_the_path_is_taken_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let make = |folder: &str, mode: u32| {
            let folder = dir.path().join(folder);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("curl"), "").unwrap();
            std::fs::set_permissions(folder.join("curl"), std::fs::Permissions::from_mode(mode)).unwrap();
            folder
        };
        let (data, first, second) = (make("data", 0o644), make("first", 0o755), make("second", 0o755));
        std::fs::create_dir_all(dir.path().join("folder/curl")).unwrap();
        let path = std::env::join_paths([dir.path().join("folder"), data.clone(), first.clone(), second]).unwrap();
        assert_eq!(Curl::find_in(&path).unwrap().0, first.join("curl"));
        assert!(Curl::find_in(data.as_os_str()).is_none());
        assert!(Curl::find_in(OsStr::new("")).is_none());
    }

    #[test]
    fn what_curl_says_is_shortened() {
        let said = "curl: (7) Failed to connect to 10.77.0.2 port 8080 after 0 ms: Couldn't connect to server\n";
        assert_eq!(in_short(said, Some(7)), "(7) refused");
        let said = "curl: (56) Recv failure: Connection reset by peer\n";
        assert_eq!(in_short(said, Some(56)), "(56) reset by peer");
        assert_eq!(in_short("curl: (52) Empty reply from server", Some(52)), "(52) empty reply");
        assert_eq!(in_short("", None), "(killed)");
    }
}
