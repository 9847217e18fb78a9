//! What is recorded through the server, and arrives at a sink.

use serde_json::json;

use crate::server::Server;

/// A value was read as the one beside it, which rounds to other units, and was delivered as that.
/// The feature of `serde_json` that prevents this is not one of the tests': else they would have it
/// where the server has not.
#[test]
fn a_value_counts_and_arrives_as_it_was_given() {
    let root = tempfile::tempdir().unwrap();
    let (data, lines) = (root.path().join("data"), root.path().join("lines"));
    let server = Server::start(&data, &["--json-lines", lines.to_str().unwrap(), "--sink-events"]);
    let mut client = server.connect();
    let cases = [
        ("cents", 2, "0.10500000000000001", 11),
        ("cents", 2, "0.47500000000000003", 11 + 48),
        ("whole", 0, "90.50000000000001", 91),
    ];
    for (quota, decimals, value, used) in cases {
        let definition = json!({ "name": quota, "limit": 1_000, "decimals": decimals });
        assert_eq!(client.send("POST", "/v1/quotas", &definition).status, 200);
        let body = format!(r#"{{"user":1,"quota":"{quota}","value":{value}}}"#);
        let answer = client.try_send("POST", "/v1/record", &body).unwrap();
        assert_eq!((answer.status, &answer.json()["used"]), (200, &json!(used)), "{value}");
    }
    assert_eq!(server.stop().0, Some(0));
    let files = std::fs::read_dir(&lines).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|it| it == "jsonl"));
    let text: String = files.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    for (_, _, value, _) in cases {
        assert!(text.contains(&format!("\"value\":{value},")), "{value}: {text}");
    }
}
