//! Connections that break: a socket in front of a server's, which cuts what passes through it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::feed::Random;

/// Breaks each of its connections after some bytes of requests, or some replies.
pub(crate) struct Proxy {
    socket: PathBuf,
    is_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Connects those who come to `socket` to `target`, each time for less than so many bytes of
    /// requests, or so many replies.
    pub(crate) fn start(socket: &Path, target: &Path, limits: [u64; 2], seed: u64) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o777)).unwrap();
        let is_ended = Arc::new(AtomicBool::new(false));
        let (ended, target) = (Arc::clone(&is_ended), target.to_path_buf());
        let thread = thread::spawn(move || {
            let mut random = Random(seed);
            for client in listener.incoming() {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(server) = UnixStream::connect(&target) else { continue };
                let client = client.unwrap();
                let (mut bytes, mut replies) = (u64::MAX, u64::MAX);
                match random.below(2) {
                    0 => bytes = random.below(limits[0]),
                    _ => replies = random.below(limits[1]),
                }
                pump(client.try_clone().unwrap(), server.try_clone().unwrap(), move |read| {
                    let kept = usize::try_from(bytes).unwrap_or(usize::MAX).min(read);
                    bytes -= kept as u64;
                    kept
                });
                pump(server, client, move |read| {
                    replies = replies.saturating_sub(1);
                    if replies > 0 { read } else { read / 2 }
                });
            }
        });
        Self { socket: socket.to_path_buf(), is_ended, thread: Some(thread) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.is_ended.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&self.socket));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Copies until one side ends, or less is to be kept than was read; then both have ended.
fn pump(
    mut from: UnixStream,
    mut to: UnixStream,
    mut kept: impl FnMut(usize) -> usize + Send + 'static,
) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let kept = kept(read);
            if to.write_all(&buffer[..kept]).is_err() || kept < read {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}
