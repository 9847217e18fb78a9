//! The operator's commands, through the real binary: what they say, their status, and that they
//! change nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tollgate::{Config, Quota, Tollgate, Window};

use crate::support::small;

const BINARY: &str = env!("CARGO_BIN_EXE_tollgate");

fn run(arguments: &[&str], dir: &Path) -> Output {
    Command::new(BINARY).args(arguments).arg(dir).output().unwrap()
}

fn verify(dir: &Path) -> (Option<i32>, String) {
    let output = run(&["verify"], dir);
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), text + &String::from_utf8(output.stderr).unwrap())
}

fn json_of(command: &str, dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&run(&[command, "--json"], dir).stdout).unwrap()
}

/// Every byte and every name.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

fn flip(path: &Path, offset: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[offset] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// The files whose names begin like this, sorted.
fn files(dir: &Path, prefix: &str) -> Vec<std::path::PathBuf> {
    let names = contents(dir).into_keys().filter(|name| name.starts_with(prefix));
    names.map(|name| dir.join(name)).collect()
}

/// Two snapshots and a journal behind them.
fn fill(dir: &Path) {
    let gate = Tollgate::open(dir, small()).unwrap();
    let quota = gate.define(Quota::new("requests", 1_000).window(Window::Lifetime)).unwrap();
    for round in 1..=3 {
        for user in 0..10 {
            gate.consume(user, quota, round).unwrap();
        }
        gate.set_limit(1, quota, 50 + round).unwrap();
        if round < 3 {
            gate.snapshot().unwrap();
        }
    }
    gate.close().unwrap();
}

#[test]
fn verify_tells_what_an_open_would_do_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    fill(&dir);
    let before = contents(&dir);
    let (status, text) = verify(&dir);
    assert_eq!(status, Some(0), "{text}");
    for name in before.keys().filter(|&name| name != "tollgate.lock") {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}: ")));
        assert!(line.is_some_and(|line| line.ends_with(": ok")), "{name} in {text}");
    }
    assert!(text.contains("\nsound: "), "{text}");

    // What the newest snapshot makes up for.
    let [older, newer] = &files(&dir, "snapshot-")[..] else { panic!("two snapshots") };
    flip(older, 600);
    let (status, text) = verify(&dir);
    assert_eq!(status, Some(3), "{text}");
    assert!(text.contains("damaged at "), "{text}");
    flip(older, 600);

    // What the older one makes up for, and an open reports.
    flip(newer, 600);
    let (status, text) = verify(&dir);
    assert_eq!(status, Some(4), "{text}");
    assert!(text.contains("an open would report: "), "{text}");
    let (json, inspected) = (json_of("verify", &dir), json_of("inspect", &dir));
    assert_eq!(
        (&json["verdict"], &json["text"]),
        (&"findings".into(), &"opens, with findings".into())
    );
    assert!(json["findings"][0]["what"].is_string(), "{json}");
    assert!(inspected["findings"][0]["what"].is_string(), "{inspected}");

    // What nothing makes up for.
    let [journal, ..] = &files(&dir, "journal-")[..] else { panic!("a journal") };
    flip(older, 600);
    assert_eq!(verify(&dir).0, Some(4), "the journal goes back to its beginning");
    flip(journal, 70);
    let damaged = contents(&dir);
    let (status, text) = verify(&dir);
    assert_eq!(status, Some(5), "{text}");
    assert!(text.contains("\nrefused: "), "{text}");
    assert!(!text.contains("tollgate verify"), "it says so itself: {text}");
    assert_eq!(contents(&dir), damaged, "verify changed something");
    flip(newer, 600);
    flip(older, 600);
    flip(journal, 70);
    assert_eq!(contents(&dir), before);
    assert_eq!(verify(&dir).0, Some(0));
    assert_eq!(json_of("verify", &dir)["verdict"], "sound");
}

#[test]
fn verify_refuses_a_directory_in_use_and_one_that_is_none() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    let gate = Tollgate::open(&dir, small()).unwrap();
    let (status, text) = verify(&dir);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("in use by another process"), "{text}");
    gate.close().unwrap();
    assert_eq!(verify(&dir).0, Some(0));

    let (status, text) = verify(root.path());
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("not a data directory"), "{text}");
    let missing = root.path().join("missing");
    assert_eq!(verify(&missing).0, Some(1));
    assert!(!missing.exists());
}

fn salvage(dir: &Path, to: &Path) -> (Option<i32>, String) {
    let output = Command::new(BINARY).arg("salvage").arg(dir).arg("--to").arg(to).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code(), text + &String::from_utf8(output.stderr).unwrap())
}

/// What [`fill`] has counted, for each user; and user 1's limit.
fn usage(dir: &Path) -> (Vec<u64>, u64) {
    let gate = Tollgate::open(dir, small()).unwrap();
    assert!(gate.recovery_report().findings.is_empty(), "{:?}", gate.recovery_report());
    let quota = gate.quota_by_name("requests").unwrap();
    let used = (0..10).map(|user| gate.usage(user, quota).unwrap().used).collect();
    (used, gate.usage(1, quota).unwrap().limit)
}

#[test]
fn salvage_of_an_undamaged_directory_is_exact_and_another_engine() {
    let root = tempfile::tempdir().unwrap();
    let (dir, to) = (root.path().join("data"), root.path().join("new"));
    fill(&dir);
    let before = contents(&dir);
    let (status, text) = salvage(&dir, &to);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("nothing is lost"), "{text}");
    assert_eq!(contents(&dir), before, "salvage changed something");
    assert_eq!(verify(&to).0, Some(0));
    assert_eq!(usage(&to), (vec![6; 10], 53));
    assert_eq!(usage(&to), (vec![6; 10], 53), "a second open");
    let ids = [&dir, &to].map(|dir| tollgate::inspect(dir).unwrap().engine_id);
    assert_ne!(ids[0], ids[1]);
}

/// An empty directory, or anybody's, is not one that is damaged; and it stays as it is.
#[test]
fn what_is_no_data_directory_is_called_so() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("notes.txt"), "theirs").unwrap();
    let errors = [
        tollgate::verify(root.path()).map(drop).unwrap_err(),
        tollgate::inspect(root.path()).map(drop).unwrap_err(),
        tollgate::forget_sink(root.path(), "billing").map(drop).unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.ends_with("this is not a data directory"), "{text}");
        assert!(!text.contains("damaged"), "{text}");
    }
    assert_eq!(contents(root.path()).into_keys().collect::<Vec<_>>(), ["notes.txt"]);
}

/// The mark that the directory was created is lost, which an open makes good; and a snapshot is
/// damaged, which is as long as it was.
#[test]
fn inspect_sees_what_an_open_would() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    fill(&dir);
    let sound = tollgate::inspect(&dir).unwrap();
    let id = dir.join("tollgate.id");
    let mut bytes = std::fs::read(&id).unwrap();
    bytes[24] = 0;
    let crc = crc32fast::hash(&bytes[..44]);
    bytes[44..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&id, bytes).unwrap();
    let found = tollgate::inspect(&dir).unwrap();
    assert_eq!((found.report, found.files), (sound.report, sound.files));
    assert_eq!(found.quotas[0].used, sound.quotas[0].used);

    let older = &files(&dir, "snapshot-")[0];
    flip(older, 600);
    let inspection = tollgate::inspect(&dir).unwrap();
    let is_it = |file: &&tollgate::InspectedFile| older.ends_with(&file.name);
    let file = inspection.files.iter().find(is_it).unwrap();
    assert!(matches!(file.state, tollgate::InspectedFileState::DamagedSnapshot(_)), "{file:?}");
    assert_eq!(file.bytes, std::fs::metadata(older).unwrap().len());
}

#[test]
fn salvage_answers_a_refusal() {
    let root = tempfile::tempdir().unwrap();
    let (dir, to) = (root.path().join("data"), root.path().join("new"));
    fill(&dir);
    let [older, newer] = &files(&dir, "snapshot-")[..] else { panic!("two snapshots") };
    let [journal, ..] = &files(&dir, "journal-")[..] else { panic!("a journal") };
    for path in [older, newer] {
        flip(path, 600);
    }
    // The first batch after the beginning is gone, and with it the definition of the quota, which
    // the snapshots' heads still know.
    flip(journal, 70);
    assert_eq!(verify(&dir).0, Some(5));
    let before = contents(&dir);
    let (status, text) = salvage(&dir, &to);
    assert_eq!(status, Some(4), "{text}");
    for said in ["lost: ", "batches 1..=1 are lost", "damaged: "] {
        assert!(text.contains(said), "{said} in {text}");
    }
    assert_eq!(contents(&dir), before, "salvage changed something");
    assert_eq!(verify(&to).0, Some(0));
    assert_eq!(usage(&to), (vec![6; 10], 53), "batch 1 counted nothing");
}

#[test]
fn salvage_refuses_what_is_in_its_way() {
    let root = tempfile::tempdir().unwrap();
    let (dir, to) = (root.path().join("data"), root.path().join("new"));
    fill(&dir);
    let before = contents(&dir);
    for (to, reason) in [(&dir, "not empty"), (&dir.join("new"), "inside the other directory")] {
        let (status, text) = salvage(&dir, to);
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains(reason), "{reason} in {text}");
    }
    assert_eq!(contents(&dir), before);
    let gate = Tollgate::open(&dir, small()).unwrap();
    let (status, text) = salvage(&dir, &to);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("in use by another process"), "{text}");
    assert!(!to.exists());
    gate.close().unwrap();
}

/// The lock's file was left there, and the next attempt refused.
#[test]
fn a_salvage_that_failed_can_be_tried_again() {
    let root = tempfile::tempdir().unwrap();
    let (dir, to) = (root.path().join("data"), root.path().join("new"));
    fill(&dir);
    let limit = "ulimit -f 0; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", limit, BINARY, "salvage"])
        .arg(&dir)
        .arg("--to")
        .arg(&to)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("snapshot"), "no file is named: {said}");
    assert_eq!(contents(&to).len(), 0);
    let (status, text) = salvage(&dir, &to);
    assert_eq!(status, Some(0), "{text}");
}

/// `tollgate verify data | head -0`, and a full disk under what is printed.
#[test]
fn commands_that_cannot_print_keep_their_status() {
    let root = tempfile::tempdir().unwrap();
    let (dir, to) = (root.path().join("data"), root.path().join("new"));
    fill(&dir);
    let [older, _] = &files(&dir, "snapshot-")[..] else { panic!("two snapshots") };
    flip(older, 600);
    let run_to = |arguments: &[&str], stdout: Stdio| {
        let output = Command::new(BINARY).args(arguments).stdout(stdout).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (dir, to) = (dir.to_str().unwrap(), to.to_str().unwrap());
    let commands: [(&[&str], i32); 4] = [
        (&["verify", dir], 3),
        (&["verify", "--json", dir], 3),
        (&["inspect", dir], 0),
        (&["salvage", dir, "--to", to], 0),
    ];
    for (command, status) in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (code, said) = run_to(command, writer.into());
        assert_eq!((code, said.as_str()), (Some(status), ""), "{command:?}");
    }
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    for (command, status) in [(&["verify", dir][..], 3), (&["inspect", dir], 1)] {
        let (code, said) = run_to(command, full());
        assert_eq!(code, Some(status), "{command:?}: {said}");
        assert!(said.starts_with("tollgate: can't print: No space left"), "{said}");
    }
}

#[test]
fn inspect_says_how_often_a_directory_was_opened() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    for times in [1, 2] {
        Tollgate::open(&dir, small()).unwrap().close().unwrap();
        let text = String::from_utf8(run(&["inspect"], &dir).stdout).unwrap();
        assert!(text.contains(&format!(", times opened: {times}\n")), "{text}");
    }
}

/// A mistake was found only by the next start of the server.
#[test]
fn a_configuration_is_checked_before_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, text: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let output = run(&["check-config"], &file);
        let said = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
        (output.status.code(), said)
    };
    let (status, [printed, complaint]) = check("a.yaml", "preset: low_latency\nlanes: 7\n");
    assert_eq!((status, &*complaint), (Some(0), ""));
    let expected = Config::low_latency().lanes(7).to_string();
    assert!(printed == expected && printed.contains("lanes = 7\n"), "{printed}");
    assert_eq!(check("b.toml", &printed), (Some(0), [printed, String::new()]));
    let (status, [printed, complaint]) = check("c.toml", "lanes = \"8\"\n");
    assert_eq!((status, &*printed), (Some(1), ""));
    assert!(complaint.contains("c.toml), allowed: 1..=1024, written as a number"), "{complaint}");
}
