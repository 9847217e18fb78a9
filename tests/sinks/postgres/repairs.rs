//! What an operator is told to do, done.

use std::sync::atomic::AtomicBool;

use super::*;

#[test]
fn what_is_told_is_right() {
    let Some(server) = start() else { return };
    let dir = server.dir();
    emptied_tables_are_given_all_totals_once(dir);
}

/// The words of docs/sinks.md from `begin` to `end`, for the tables' schema.
fn documented(tables: &Tables<'_>, begin: &str, end: char) -> String {
    let text = include_str!("../../../docs/sinks.md");
    let found = text.find(begin).map(|start| text[start..].split(end).next().unwrap());
    let found = found.unwrap_or_else(|| panic!("{begin} is not documented"));
    found.replace("tollgate.", &format!("{}.", tables.quoted()))
}

/// While an engine delivers.
fn emptied_tables_are_given_all_totals_once(dir: &Path) {
    let tables = Tables::new(dir);
    let statement = documented(&tables, "TRUNCATE tollgate.", ';');
    let data = tempfile::tempdir().unwrap();
    let gate = embedded::open(data.path(), tables.open());
    let [tokens, _] = embedded::define(&gate);
    let is_over = AtomicBool::new(false);
    let mut consumed = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                thread::sleep(Duration::from_millis(20));
                tables.execute(&statement);
            }
            is_over.store(true, Ordering::Release);
        });
        while !is_over.load(Ordering::Acquire) {
            gate.consume(consumed % 7, tokens, 1).unwrap();
            consumed += 1;
            // It is refused where it finds the tables emptied, and then gives all totals.
            let _ = gate.deliver(Duration::from_millis(500));
        }
    });
    let _ = gate.deliver(PATIENCE);
    gate.deliver(PATIENCE).unwrap();
    let used = |user| i128::from(gate.usage(user, tokens).unwrap().used);
    let expected = (0..7).map(|user| ((user, "tokens".to_owned(), 0), (used(user), 1 << 40)));
    assert_eq!(tables.totals(), expected.collect());
}
