use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn config(text: &str) -> Config {
    crate::config::parse(text, "f.yaml").unwrap().config
}

/// A folder with the directories `conf`, `certs`, `rego`, `run`, `state`, and a config that names things in them.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["conf", "certs", "lists", "rego", "run", "state"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self { folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(name)
    }

    fn files(&self) -> Config {
        let at = |name: &str| self.at(name).display().to_string();
        config(&format!(
            "identity:\n  files: {{ certificate: {}, key: {}, bundles: {{ td: {} }} }}\n  crls: [{}]\n\
             inbound:\n  - {{ name: a, listen: '127.0.0.1:1', to: 'unix://{}', protocol: http, allow: ['spiffe://td'],\n\
             \x20     http: {{ rego: {{ module: {} }} }} }}\n\
             outbound:\n  - {{ name: b, listen: 'unix://{}', to: 'a:1', expect: 'spiffe://td/a' }}\n",
            at("certs/a.crt"),
            at("certs/a.key"),
            at("certs/td.pem"),
            at("lists/a.crl"),
            at("elsewhere/app.sock"),
            at("rego/a.rego"),
            at("run/b.sock"),
        ))
    }

    fn grants(&self, config: &Config) -> Grants {
        Grants::of(config, &self.at("conf/a.yaml"))
    }
}

#[test]
fn directories_of_all_that_is_named_and_nothing_beside() {
    let place = Place::new();
    let grants = place.grants(&place.files());
    assert_eq!(grants.notes, Vec::<String>::new());
    let own = |grants: &Grants| -> Vec<(PathBuf, Access)> {
        let folder = place.at("");
        grants.list.iter().filter(|(path, _)| path.starts_with(&folder)).cloned().collect()
    };
    let expected = [
        (place.at("certs"), Access::Read),
        (place.at("conf"), Access::Read),
        (place.at("lists"), Access::Read),
        (place.at("rego"), Access::Read),
        (place.at("run"), Access::Bind),
    ];
    assert_eq!(own(&grants), expected);

    let state = place.at("state").display().to_string();
    let bundle = place.at("certs/else.json").display().to_string();
    let authority = config(&format!(
        "identity:\n  authority: {{ spiffe_id: 'spiffe://td/a', state_dir: {state}, federates_with: {{ else: {bundle} }} }}\n\
         inbound: [{{ name: a, listen: '127.0.0.1:1', to: '127.0.0.1:2', allow: ['spiffe://td'] }}]\n"
    ));
    let expected =
        [(place.at("certs"), Access::Read), (place.at("conf"), Access::Read), (place.at("state"), Access::Keep)];
    assert_eq!(own(&place.grants(&authority)), expected);
}

#[test]
fn nothing_is_granted_twice() {
    let grant = |path: &str, access| (PathBuf::from(path), access);
    let all = [
        grant("/a", Access::Read),
        grant("/a/b", Access::Read),
        grant("/a/b", Access::Bind),
        grant("/ab", Access::Read),
        grant("/c", Access::Keep),
        grant("/c", Access::Read),
    ];
    let once = Grants { list: all.into(), notes: Vec::new() }.without_repetition().list;
    let kept =
        [grant("/a", Access::Read), grant("/a/b", Access::Bind), grant("/ab", Access::Read), grant("/c", Access::Keep)];
    assert_eq!(once, kept.into());
}

#[test]
fn a_socket_that_is_connected_to_needs_nothing() {
    let config = config(
        "identity: unix:///run/agent/agent.sock\n\
         inbound: [{ name: a, listen: '127.0.0.1:1', to: 'unix:///run/app/app.sock', allow: ['spiffe://td'] }]\n",
    );
    let place = Place::new();
    assert!(
        !place.grants(&config).list.iter().any(|(path, _)| path.starts_with("/run/agent") || path.ends_with("app"))
    );
}

#[test]
fn the_process_itself_the_resolver_and_its_modules_stay_readable() {
    let place = Place::new();
    let grants = place.grants(&place.files());
    assert!(grants.list.contains(&("/proc/self".into(), Access::List)));
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/lib/x86_64-linux-gnu/libc.so.6"] {
        let Ok(real) = Path::new(file).canonicalize() else { continue };
        assert!(grants.list.iter().any(|(path, access)| *access == Access::Read && real.starts_with(path)), "{file}");
    }
    assert!(!grants.list.iter().any(|(path, _)| path == Path::new("/")));
}

#[test]
fn links_are_followed_to_where_files_really_are() {
    let place = Place::new();
    std::fs::create_dir(place.at("real")).unwrap();
    std::fs::write(place.at("real/a.crt"), "").unwrap();
    symlink(place.at("real/a.crt"), place.at("certs/a.crt")).unwrap();
    let grants = place.grants(&place.files());
    assert!(grants.list.contains(&(place.at("real"), Access::Read)));
    assert!(grants.list.contains(&(place.at("certs"), Access::Read)));

    // As Kubernetes has it: everything below the one directory, however often it is swapped.
    std::fs::create_dir(place.at("conf/..1")).unwrap();
    std::fs::write(place.at("conf/..1/a.yaml"), "").unwrap();
    symlink("..1", place.at("conf/..data")).unwrap();
    symlink("..data/a.yaml", place.at("conf/a.yaml")).unwrap();
    assert!(place.grants(&place.files()).list.contains(&(place.at("conf"), Access::Read)));
}

#[test]
fn what_is_not_there_yet_is_found_later_in_the_nearest_directory_but_never_by_opening_the_root() {
    let need = |path: &Path| readable(path);
    let place = Place::new();
    let later = need(&place.at("certs/later/still/a.crt"));
    assert_eq!(later.grant, Some((place.at("certs"), Access::Read)));
    assert!(later.note.unwrap().contains("is not there yet"));

    let root = need(Path::new("/no-such-directory/a.crt"));
    assert_eq!(root.grant, None);
    assert!(root.note.unwrap().contains("restart"));
    assert_eq!(need(Path::new("/no-such-file")).grant, None);
}

#[test]
fn a_reload_within_is_covered_and_one_beyond_is_named() {
    let place = Place::new();
    let first = place.files();
    let grants = place.grants(&first);
    grants.cover(&first).unwrap();

    let mut moved = place.files();
    let rego = moved.inbound[0].http.rego.as_mut().unwrap();
    rego.module = place.at("rego/b.rego");
    rego.shadow = Some(place.at("certs/c.rego"));
    moved.outbound[0].listen = Some(format!("unix://{}", place.at("run/c.sock").display()));
    moved.inbound[0].to = Some(format!("unix://{}", place.at("state/other.sock").display()));
    grants.cover(&moved).unwrap();

    let refused = |change: &dyn Fn(&mut Config)| {
        let mut config = place.files();
        change(&mut config);
        grants.cover(&config).unwrap_err()
    };
    let rego = refused(&|config| config.inbound[0].http.rego.as_mut().unwrap().module = place.at("state/a.rego"));
    assert!(rego.starts_with("inbound 'a', http.rego: ") && rego.contains("restart"), "{rego}");
    // To read is not to bind, and the other way round.
    let bind = refused(&|c| c.outbound[0].listen = Some(format!("unix://{}", place.at("certs/b.sock").display())));
    assert!(bind.starts_with("outbound 'b', listen: "), "{bind}");
    let read = refused(&|c| c.inbound[0].http.rego.as_mut().unwrap().module = place.at("run/a.rego"));
    assert!(read.contains("run/a.rego"), "{read}");
    // A link inside that leads outside.
    std::fs::write(place.at("state/a.rego"), "").unwrap();
    symlink(place.at("state/a.rego"), place.at("rego/link.rego")).unwrap();
    refused(&|c| c.inbound[0].http.rego.as_mut().unwrap().module = place.at("rego/link.rego"));
    // The way there does not change where it is.
    refused(&|c| c.inbound[0].http.rego.as_mut().unwrap().module = place.at("rego/../state/a.rego"));
}

#[test]
fn a_resolver_file_that_is_a_mount_opens_nothing_around_it() {
    let place = Place::new();
    let file = place.at("conf/resolv.conf");
    std::fs::write(&file, "").unwrap();
    assert_eq!(resolver_file(&file, ""), [(place.at("conf"), Access::Read), (place.at("conf"), Access::Read)]);
    let mounts = format!("22 1 0:20 / / rw - ext4 /dev/a rw\n36 22 0:30 /x {} rw - tmpfs tmpfs rw\n", file.display());
    assert_eq!(resolver_file(&file, &mounts), [(file.clone(), Access::Read)]);

    let link = place.at("conf/link.conf");
    std::fs::write(place.at("run/stub.conf"), "").unwrap();
    symlink("../run/stub.conf", &link).unwrap();
    assert_eq!(resolver_file(&link, &mounts), [(place.at("conf"), Access::Read), (place.at("run"), Access::Read)]);
    assert_eq!(resolver_file(&place.at("none"), &mounts), []);
}

#[test]
fn what_only_a_capability_could_read_is_told() {
    let place = Place::new();
    std::fs::write(place.at("certs/a.key"), "").unwrap();
    let config = place.files();
    let said = |config: Config| {
        // On a thread of its own: capabilities do not come back.
        std::thread::spawn(move || {
            super::super::capabilities::keep_only(rustix::thread::CapabilitySet::empty()).unwrap();
            unreachable(&config)
        })
        .join()
        .unwrap()
    };
    assert_eq!(said(config.clone()), Vec::<String>::new());
    std::fs::set_permissions(place.at("certs/a.key"), std::fs::Permissions::from_mode(0o000)).unwrap();
    let said = said(config);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("identity.files.key: ") && said[0].contains("a.key"), "{said:?}");
}
