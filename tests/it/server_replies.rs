//! What the server tells whom: what it prints to try, and what is for those with the token only.

use serde_json::{Value, json};

use crate::server::{Server, answers_of_printed_lines};

/// There is nothing to count yet.
#[test]
fn without_quotas_the_printed_line_defines_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &["--no-default-quota"]);
    let [quota] = &answers_of_printed_lines(&server)[..] else { panic!("one line") };
    let (name, limit) = (&quota["name"], &quota["limit"]);
    assert_eq!((name, limit), (&json!("requests"), &json!(1_000)));
    server.kill();
}

/// What is wrong may name files and repeat what a database said.
#[test]
fn health_gives_its_reasons_to_those_with_the_token_only() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "s3cret").unwrap();
    let data = dir.path().join("data");
    let server = Server::start(&data, &["--token-file", token.to_str().unwrap()]);
    let mut client = server.connect();
    for headers in ["", "Authorization: Bearer s3cre\r\n"] {
        client.headers = headers.to_owned();
        assert_eq!(client.get("/health").json(), json!({ "level": "healthy" }));
    }
    client.headers = "Authorization: Bearer s3cret\r\n".to_owned();
    let whole = json!({ "level": "healthy", "reasons": [] });
    assert_eq!(client.get("/health").json(), whole);
    server.kill();
    let server = Server::start(&data, &[]);
    assert_eq!(server.connect().get("/health").json(), whole, "no token is asked for");
    server.kill();
}

#[test]
fn the_root_names_paths_that_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let mut client = server.connect();
    let text = client.get("/").body;
    let paths: Vec<_> = text.split([' ', ',', '\n']).filter(|word| word.starts_with('/')).collect();
    assert_eq!(paths.len(), 4, "{text}");
    for path in paths {
        assert_eq!(client.send("GET", path, &Value::Null).status, 200, "{path}");
    }
    server.kill();
}
