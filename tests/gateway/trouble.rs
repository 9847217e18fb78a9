//! Clients and upstreams that do not do what is expected of them.

use serde_json::json;

use crate::scenarios::{HOUR, MAX_TOKENS, PLENTY, prompt, request, start};
use crate::upstream::{Script, Upstream};

const SILENT: Script = Script { total_tokens: None, pieces: 0, holds: false };

/// Both names of the bound are sent on, and the upstream may go by either.
#[test]
fn the_larger_of_two_bounds_is_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let script = Script { holds: true, ..SILENT };
    let mut asks = request(&script, true);
    asks["max_completion_tokens"] = json!(1);
    let _stream = gateway.complete("alice", &asks);
    let reserved = prompt() + MAX_TOKENS;
    assert_eq!(gateway.usage("alice"), [(reserved, reserved); 2]);
}
