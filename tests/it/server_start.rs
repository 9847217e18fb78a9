//! How the server starts: what its flags do, and what it says.

use std::path::Path;

use serde_json::json;

use crate::server::Server;

fn lines_with(server: &Server, words: &str) -> Vec<String> {
    server.greeting.iter().filter(|line| line.contains(words)).cloned().collect()
}

/// A service that starts while its database does not was one outage more.
#[cfg(feature = "postgres")]
#[test]
fn a_database_that_is_down_does_not_stop_the_start() {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--postgres", "host=/nowhere user=tollgate", "--postgres-migrate"];
    let mut command = Command::new(crate::server::BINARY);
    let mut server = Server::launch(command.stderr(Stdio::piped()), dir.path(), &arguments);
    let mut stderr = server.child.stderr.take().unwrap();
    assert_eq!(server.connect().get("/v1/quotas").status, 200);
    server.kill();
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert!(said.contains("--postgres-migrate: ") && said.contains("going on"), "{said}");
}

/// A server once defined a quota that nobody had asked for, and that nobody can remove.
#[test]
fn quotas_are_defined_where_they_are_asked_for_and_absent() {
    let dir = tempfile::tempdir().unwrap();
    let quotas = |server: &Server| server.connect().get("/v1/quotas").json()["quotas"].clone();
    let server = Server::start_without_quota(dir.path(), &[]);
    assert_eq!(quotas(&server), json!([]));
    server.kill();
    let asked = ["--no-create", "--quota", "requests=1000/day", "--quota", "a=b=5/lifetime"];
    let server = Server::start_without_quota(dir.path(), &asked);
    let defined = "defined the quota \"requests\": limit 1000, window day".to_owned();
    assert!(server.greeting.contains(&defined), "{:?}", server.greeting);
    let names = |server: &Server| [0, 1].map(|at| quotas(server)[at]["name"].clone());
    assert_eq!(names(&server), ["requests", "a=b"]);
    let raised = json!({ "name": "requests", "limit": 5_000, "window": "day" });
    assert_eq!(server.connect().send("POST", "/v1/quotas", &raised).status, 200);
    server.kill();
    let server = Server::start_without_quota(dir.path(), &asked);
    let [said] = &lines_with(&server, "the quota")[..] else { panic!("{:?}", server.greeting) };
    assert!(said.contains("stays as it is: limit 5000") && said.contains("limit 1000"), "{said}");
    assert_eq!(quotas(&server)[0]["limit"], 5_000);
    server.kill();
}

#[test]
fn files_of_json_lines_are_as_long_as_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let lines = root.path().join("lines");
    let arguments = ["--json-lines", lines.to_str().unwrap(), "--json-lines-file-size", "1B"];
    for _ in 0..2 {
        let server = Server::start(&root.path().join("data"), &arguments);
        let body = json!({ "user": 42, "quota": "requests" });
        assert_eq!(server.connect().send("POST", "/v1/consume", &body).status, 200);
        assert_eq!(server.stop().0, Some(0));
    }
    let files = std::fs::read_dir(&lines).unwrap().map(|entry| entry.unwrap().file_name());
    let files = files.filter(|name| name.to_string_lossy().ends_with(".jsonl"));
    assert_eq!(files.count(), 2, "a delivery each");
}

/// The keys that the server asks for, of something that takes every command.
#[cfg(feature = "redis")]
#[test]
fn keys_in_redis_begin_as_is_asked_for() {
    use std::io::{Read as _, Write as _};

    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let arguments = ["--redis", &url, "--redis-prefix", "billing", "--redis-retention", "90d"];
    let server = Server::start(dir.path(), &arguments);
    let (mut asked, mut piece) = (String::new(), [0; 4096]);
    let (mut stream, _) = listener.accept().unwrap();
    while !asked.contains(":position:") {
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "{asked}");
        let commands = String::from_utf8_lossy(&piece[..count]).into_owned();
        // A command is an array, and the number of its parts comes first.
        let answers = "+OK\r\n".repeat(commands.lines().filter(|it| it.starts_with('*')).count());
        asked.push_str(&commands);
        stream.write_all(answers.as_bytes()).unwrap();
    }
    assert!(asked.contains("\r\n{billing}:position:"), "{asked}");
    server.kill();
}

/// The golden directory is from another machine, and its clock.
#[test]
fn what_a_loss_of_power_may_have_taken_is_said() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3/closed");
    std::fs::create_dir(&dir).unwrap();
    for file in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(file.path(), dir.join(file.file_name())).unwrap();
    }
    let words = "  the machine was restarted: what no sync had covered may be missing";
    for times in [1, 0] {
        let server = Server::start(&dir, &[]);
        assert_eq!(lines_with(&server, words).len(), times, "{:?}", server.greeting);
        assert_eq!(server.stop().0, Some(0));
    }
}
