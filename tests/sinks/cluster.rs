//! A PostgreSQL of one's own, for the tests and the benchmarks.

use std::fs;
use std::path::Path;

use postgres::{Client, NoTls};

use crate::servers::{Program, Server, command, directory};

const VERSIONS: Option<&str> = Some("/usr/lib/postgresql");

/// Starts a new and empty server, with arguments, and something to be done in its directory before
/// the start. `None` where the programs are not installed.
pub(crate) fn start(arguments: &str, prepare: impl FnOnce(&Path)) -> Option<Server> {
    let initdb = Program { names: &["initdb"], versions: VERSIONS }.find()?;
    let postgres = Program { names: &["postgres"], versions: VERSIONS }.find()?;
    let dir = directory();
    let initdb_arguments = "-D data -U tollgate -A trust -E UTF8 --no-locale --no-sync";
    let made = command(&initdb, dir.path()).args(initdb_arguments.split(' ')).status().unwrap();
    assert!(made.success(), "{}", fs::read_to_string(dir.path().join("log")).unwrap());
    prepare(dir.path());
    let socket_dir = format!("unix_socket_directories={}", dir.path().display());
    let arguments = format!("-D data {arguments} -c");
    let arguments: Vec<_> = arguments.split(' ').chain([&*socket_dir]).collect();
    Some(Server::start(dir, postgres, &arguments, |dir| connect(dir).is_some()))
}

/// How to connect to a server in this directory that has the usual port.
pub(crate) fn parameters(dir: &Path) -> String {
    format!("host={} user=tollgate dbname=postgres", dir.display())
}

pub(crate) fn connect(dir: &Path) -> Option<Client> {
    // The socket's name ends with the port.
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let port = names
        .filter_map(|name| name.to_str()?.strip_prefix(".s.PGSQL.")?.parse::<u16>().ok())
        .next()?;
    Client::connect(&format!("{} port={port}", parameters(dir)), NoTls).ok()
}
