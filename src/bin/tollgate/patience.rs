//! A connection whose peer does not take its answers is given up.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// What is written makes progress within a bound, or fails. Reading is not bounded: hyper bounds
/// heads, and the endpoints their bodies.
#[derive(Debug)]
pub(crate) struct Patience<S> {
    stream: S,
    bound: Duration,
    /// Runs while a write is pending.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Patience<S> {
    pub(crate) fn new(stream: S, bound: Duration) -> Self {
        Self { stream, bound, timer: None }
    }
}

impl<S: Unpin> Patience<S> {
    /// Polls what writes, for so long as the bound allows.
    fn bounded<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(result) = poll(Pin::new(&mut self.stream), cx) {
            self.timer = None;
            return Poll::Ready(result);
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.bound)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patience<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patience<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.bounded(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.bounded(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bounded(cx, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bounded(cx, AsyncWrite::poll_shutdown)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::time::Instant;

    use super::*;

    const BOUND: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_write_that_nobody_takes_fails() {
        let (stream, peer) = duplex(8);
        let mut stream = Patience::new(stream, BOUND);
        let began = Instant::now();
        let error = stream.write_all(&[0; 9]).await.expect_err("it does not fit");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(began.elapsed().as_secs(), BOUND.as_secs());
        drop(peer);
    }

    /// The bound is on each wait, not on all of them, and not on reading.
    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_is_waited_for() {
        let (stream, mut peer) = duplex(8);
        let mut stream = Patience::new(stream, BOUND);
        let reader = tokio::spawn(async move {
            let mut taken = [0; 24];
            for piece in taken.chunks_mut(8) {
                sleep(BOUND - Duration::from_secs(1)).await;
                peer.read_exact(piece).await.expect("it is there");
            }
            sleep(2 * BOUND).await;
            peer.write_all(&[1]).await.expect("it is read");
            taken
        });
        stream.write_all(&[7; 24]).await.expect("it is taken");
        assert_eq!(stream.read_u8().await.expect("it comes"), 1);
        assert_eq!(reader.await.expect("it ends"), [7; 24]);
    }
}
