//! The server where something is in its way: a disk that takes nothing, a terminal that is gone, a
//! second signal, few file descriptors.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::json;

use crate::server::{BINARY, Client, REQUESTS, Server, half_a_request, run_printed_lines};

/// From here on no file of the process can be written to, or all can again. The rings are mapped:
/// they still can.
fn limit_files(server: &Server, bytes: Option<u64>) {
    let limit = Rlimit { current: bytes, maximum: None };
    prlimit(Some(server.pid()), Resource::Fsize, limit).unwrap();
}

fn config(dir: &Path, text: &str) -> String {
    let file = dir.join("tollgate.toml");
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

/// More operations than the server has threads wait for room in the log, and the others are
/// answered all the same. (They used to wait on the threads that answer.)
#[test]
fn a_full_log_holds_up_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let config = config(
        root.path(),
        "lanes = 1\nlane_records = 1024\nbackpressure_deadline = \"60s\"\n\
         journal_file_bytes = \"64KiB\"\n",
    );
    let server = Server::start(&root.path().join("data"), &["--config", &config]);
    let mut client = server.connect();
    limit_files(&server, Some(0));
    let callers = 2 * thread::available_parallelism().unwrap().get() as u64 + 1;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let count = |user: u64| {
            let mut client = server.connect();
            let body = json!({ "user": user, "quota": "requests" });
            loop {
                let answer = client.send("POST", "/v1/consume", &body);
                let is_done = done.load(Ordering::SeqCst);
                done.fetch_or(answer.status != 200, Ordering::SeqCst);
                assert_eq!(answer.status, 200, "it gave up waiting: {}", answer.body);
                if is_done {
                    return;
                }
            }
        };
        for user in 0..callers {
            scope.spawn(move || count(user));
        }
        loop {
            let stats = client.get("/stats").json();
            let waits = stats["backpressure_waits"].as_u64().unwrap();
            if waits >= callers || done.load(Ordering::SeqCst) {
                break;
            }
            thread::yield_now();
        }
        for path in ["/health", "/metrics", "/stats"] {
            assert_eq!(client.get(path).status, 200, "{path}");
        }
        let usage = client.get("/v1/users/0/quotas/requests");
        assert_eq!(usage.status, 200, "{}", usage.body);
        limit_files(&server, None);
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(server.stop().0, Some(0));
}

/// Who is told that it failed has no id to give the reservation back by.
#[test]
fn a_reservation_that_could_not_be_made_durable_is_given_back() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start(&root.path().join("data"), &[]);
    let mut client = server.connect();
    limit_files(&server, Some(0));
    let item = json!({ "user": 7, "quota": "requests", "amount": 5 });
    let one = json!({
        "user": 7, "quota": "requests", "amount": 5, "ttl_ms": 3_600_000, "sync": true
    });
    let all = json!({ "items": [item], "ttl_ms": 3_600_000, "sync": true });
    for (path, body) in [("/v1/reserve", &one), ("/v1/reserve-all", &all)] {
        let failed = client.send("POST", path, body);
        assert_eq!(failed.status, 500, "{path}: {}", failed.body);
        let usage = client.get("/v1/users/7/quotas/requests").json();
        assert_eq!((&usage["used"], &usage["reserved"]), (&json!(0), &json!(0)), "{path}");
    }
    // Under a key the same request names it again.
    client.headers = "Idempotency-Key: once\r\n".to_owned();
    assert_eq!(client.send("POST", "/v1/reserve", &one).status, 500);
    limit_files(&server, None);
    // The journal is written to again within a moment.
    let again = loop {
        let again = client.send("POST", "/v1/reserve", &one);
        if again.status == 200 {
            break again.json();
        }
    };
    assert_eq!(again["counters"][0]["reserved"], 5);
    client.headers.clear();
    let usage = client.get("/v1/users/7/quotas/requests").json();
    assert_eq!((&usage["used"], &usage["reserved"]), (&json!(5), &json!(5)));
    server.kill();
}

#[test]
fn a_second_signal_ends_the_server_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &[]);
    let (stream, _) = half_a_request(&server);
    server.terminate();
    let mut line = String::new();
    server.output.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "stopping");
    thread::sleep(Duration::from_millis(700));
    let (code, printed) = server.stop();
    assert_eq!(code, Some(130), "{printed}");
    drop(stream);
}

/// A terminal that goes away may send more than one, and so may a shell.
#[test]
fn the_same_signal_several_times_in_a_row_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path(), &[]);
    let (mut stream, rest) = half_a_request(&server);
    server.terminate();
    let mut line = String::new();
    server.output.read_line(&mut line).unwrap();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        kill_process(server.pid(), signal).unwrap();
    }
    stream.write_all(rest.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// As soon as it says how.
#[test]
fn the_server_can_be_stopped_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..20 {
        let mut child = Command::new(BINARY)
            .args(["serve", "--listen", "127.0.0.1:0", "--dir"])
            .arg(dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("listening on") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0);
        }
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{rest}");
    }
}

/// `tollgate serve | tee log`, where Ctrl-C ends `tee` first.
#[test]
fn the_server_stops_in_order_when_nobody_reads_what_it_prints() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(BINARY);
    let server = Server::launch(command.stderr(Stdio::piped()), dir.path(), &REQUESTS);
    let body = json!({ "user": 1, "quota": "requests" });
    assert_eq!(server.connect().send("POST", "/v1/consume", &body).status, 200);
    server.terminate();
    let Server { mut child, output, .. } = server;
    drop(output);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
}

#[test]
fn the_server_serves_when_nothing_can_be_printed() {
    let dir = tempfile::tempdir().unwrap();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    // Where no other test listens meanwhile: what it is given can't be read.
    let address = TcpListener::bind("127.0.0.77:0").unwrap().local_addr().unwrap().to_string();
    let mut child = Command::new(BINARY)
        .args(["serve", "--listen", &address, "--dir"])
        .arg(dir.path())
        .stdout(full())
        .stderr(full())
        .spawn()
        .unwrap();
    while TcpStream::connect(&address).is_err() {
        assert_eq!(child.try_wait().unwrap(), None, "it ended");
        thread::yield_now();
    }
    assert_eq!(Client::new(&address).get("/health").status, 200);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_printed_lines_work_for_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("it's here");
    std::fs::create_dir(&root).unwrap();
    let token = root.join("token");
    // As an editor of another system writes it.
    std::fs::write(&token, "\n \ts3cret\r\n").unwrap();
    let arguments = ["--token-file", token.to_str().unwrap()];
    let names = ["it's a/b", "50% {off} \"$(id)\" ä?#[1-3]\\", ".", ".."];
    for (number, name) in names.iter().enumerate() {
        let data = root.join(number.to_string());
        let server = Server::start_without_quota(&data, &arguments);
        let mut client = server.connect();
        client.headers = "Authorization: Bearer s3cret\r\n".to_owned();
        let definition = json!({ "name": name, "limit": 10 });
        assert_eq!(client.send("POST", "/v1/quotas", &definition).status, 200);
        server.kill();
        let server = Server::start_without_quota(&data, &arguments);
        run_printed_lines(&server);
        server.kill();
    }
}

/// The limit of open files of a process, soft and hard.
fn open_files(server: &Server) -> (u64, u64) {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.child.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<_> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

#[test]
fn the_server_takes_as_many_connections_as_it_has_descriptors_for() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stderr");
    let start = |preparation: &str| {
        let preparation = format!("{preparation}; exec 2>{}", file.display());
        let server = Server::start_after(&preparation, &dir.path().join("data"), &[]);
        let limits = open_files(&server);
        server.kill();
        (limits, std::fs::read_to_string(&file).unwrap())
    };
    let (limits, said) = start("ulimit -Sn 256; ulimit -Hn 2000");
    assert_eq!((limits, said.as_str()), ((2000, 2000), ""));
    let (limits, said) = start("ulimit -n 256");
    assert_eq!(limits, (256, 256));
    assert!(said.contains("128 connections"), "{said:?}");
}

/// A terminal's colours were in it.
#[test]
fn a_log_in_a_file_has_no_colours() {
    let root = tempfile::tempdir().unwrap();
    let config = config(root.path(), "lanes = 1\nlane_records = 1024\n");
    // In memory, of which an open warns.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = root.path().join("stderr");
    let preparation = format!("exec 2>{}", file.display());
    let said = |level: &[&str]| {
        let arguments = [&["--config", &config], level].concat();
        Server::start_after(&preparation, dir.path(), &arguments).kill();
        std::fs::read_to_string(&file).unwrap()
    };
    let warned = said(&[]);
    assert!(warned.contains("WARN") && warned.contains("in memory"), "{warned:?}");
    assert!(!warned.contains('\u{1b}'), "{warned:?}");
    assert_eq!(said(&["--log-level", "error"]), "", "nothing that is worse");
}

/// The process was ended by a signal, and said nothing.
#[test]
fn a_bound_on_files_is_said_with_the_file() {
    let root = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 8; exec \"$0\" \"$@\"", BINARY])
        .args(["serve", "--listen", "127.0.0.1:0", "--dir"])
        .arg(root.path().join("data"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("can't create") && said.contains(".tgr"), "{said}");
}

/// tokio panics there, which was the end of the process.
#[test]
fn a_start_without_threads_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    let output = Command::new(BINARY)
        // More than there is, as where no further thread may be made.
        .env("RUST_MIN_STACK", (1_u64 << 50).to_string())
        .args(["serve", "--listen", "127.0.0.1:0", "--dir"])
        .arg(&dir)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("tollgate: can't start threads") && said.lines().count() == 1,
        "{said}"
    );
    assert!(!dir.exists());
}
