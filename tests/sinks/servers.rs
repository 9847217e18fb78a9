//! Databases of the tests' own: started from the installed binaries, killed, started again.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

/// Debian's `nobody`: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A program to be looked for, and where beside `PATH`.
pub(crate) struct Program {
    pub(crate) names: &'static [&'static str],
    /// The parent of folders by version, each with a `bin`.
    pub(crate) versions: Option<&'static str>,
}

/// A server in a directory of its own.
pub(crate) struct Server {
    dir: TempDir,
    program: PathBuf,
    arguments: Vec<String>,
    is_ready: fn(&Path) -> bool,
    /// What an operator does in the directory before the server is started again.
    repair: Option<fn(&Path)>,
    child: Child,
}

impl Program {
    /// The path of the program; `None`, with a line on standard error, where it is not installed.
    pub(crate) fn find(&self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = Vec::new();
        if let Some(Ok(versions)) = self.versions.map(fs::read_dir) {
            folders.extend(versions.map(|version| version.unwrap().path().join("bin")));
            folders.sort();
            folders.reverse();
        }
        folders.extend(std::env::split_paths(&path));
        let mut candidates = folders.iter().flat_map(|folder| {
            self.names.iter().map(move |name| folder.join(name)).filter(|path| path.is_file())
        });
        let found = candidates.next();
        if found.is_none() {
            let names = self.names.join(" or ");
            let is_required = std::env::var_os("TOLLGATE_REQUIRE_SERVERS").is_some();
            assert!(!is_required, "{names} is not installed, and TOLLGATE_REQUIRE_SERVERS is set");
            eprintln!("skipped: {names} is not installed");
        }
        found
    }
}

/// A directory that the servers' user may use, short enough for the paths of sockets.
pub(crate) fn directory() -> TempDir {
    let dir = tempfile::Builder::new().prefix("tollgate-").tempdir_in("/tmp").unwrap();
    if geteuid().is_root() {
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

/// A command that runs in a directory, as another user where this one is root.
pub(crate) fn command(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    command.current_dir(dir).env("HOME", dir).env("LC_ALL", "C").stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    command
}

impl Server {
    pub(crate) fn start<A: AsRef<OsStr>>(
        dir: TempDir,
        program: PathBuf,
        arguments: &[A],
        is_ready: fn(&Path) -> bool,
    ) -> Self {
        let arguments: Vec<String> =
            arguments.iter().map(|it| it.as_ref().to_str().unwrap().to_owned()).collect();
        let child = command(&program, dir.path()).args(&arguments).spawn().unwrap();
        let mut server = Self { dir, program, arguments, is_ready, repair: None, child };
        server.wait_until_ready();
        server
    }

    pub(crate) fn repaired_by(mut self, repair: fn(&Path)) -> Self {
        self.repair = Some(repair);
        self
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Ends the server with a signal, and waits for the end.
    pub(crate) fn kill(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the server where [`kill`](Self::kill) left it.
    pub(crate) fn restart(&mut self) {
        self.spawn();
        self.wait_until_ready();
    }

    fn spawn(&mut self) {
        let dir = self.dir.path();
        if let Some(repair) = self.repair {
            repair(dir);
        }
        self.child = command(&self.program, dir).args(&self.arguments).spawn().unwrap();
    }

    fn wait_until_ready(&mut self) {
        let start = Instant::now();
        while !(self.is_ready)(self.dir.path()) {
            if start.elapsed() > START_TIMEOUT {
                let log = fs::read_to_string(self.dir().join("log")).unwrap_or_default();
                panic!("{} does not start:\n{log}", self.program.display());
            }
            thread::sleep(Duration::from_millis(10));
            // What the one before it left may still be in use for a moment.
            if self.child.try_wait().unwrap().is_some() {
                self.spawn();
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::QUIT);
        let start = Instant::now();
        while self.child.try_wait().is_ok_and(|status| status.is_none()) {
            if start.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
