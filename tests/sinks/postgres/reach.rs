//! What is between a sink and PostgreSQL: silence, locks, servers that are not the right one.

use std::net::TcpListener;

use super::*;

#[test]
fn what_is_not_there_or_not_to_be_had_is_said_in_time() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = format!("{SETTINGS} -c listen_addresses=127.0.0.1 -c port={port}");
    let Some(server) = cluster::start(&settings, |_| {}) else { return };
    let dir = server.dir();
    let parameters = format!("{} port={port}", parameters(dir));
    let tables = Tables::at(dir, parameters);
    the_longest_timeout_is_one_for_the_socket_too(&tables, port);
}

fn the_longest_timeout_is_one_for_the_socket_too(tables: &Tables<'_>, port: u16) {
    let parameters = format!("host=127.0.0.1 port={port} user=tollgate dbname=postgres");
    let sink = PostgresSink::new(&parameters).unwrap().schema(&tables.schema);
    let mut sink = sink.statement_timeout(Duration::MAX);
    assert_eq!(sink.position(Feed::new(1, 1).engine()).unwrap(), None);
}
