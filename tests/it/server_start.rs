//! How the server starts: what its flags do, and what it says.

use crate::server::Server;

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
