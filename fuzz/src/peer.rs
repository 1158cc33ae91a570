//! The other side of a connection: it says what the input says.

use std::collections::VecDeque;
use std::future::Future;
use std::io::Result;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::input::Cuts;

/// A stream that reads as a script, piece by piece, then ends. What is written to it is kept.
#[derive(Clone, Debug)]
pub struct Peer {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<Vec<u8>>,
    /// What is said only once it is asked for.
    held: VecDeque<Vec<u8>>,
    is_held: bool,
    waiting: Option<Waker>,
    written: Vec<u8>,
}

impl Peer {
    /// Says `script` in pieces.
    pub fn new(script: &[u8], cuts: Cuts) -> Self {
        let pieces = cuts.of(script).map(<[u8]>::to_vec).collect();
        let state = State {
            pieces,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Says `more` behind it, but not before [`Peer::go_on`].
    pub fn holding(self, more: &[u8], cuts: Cuts) -> Self {
        self.with(|state| {
            state.held = cuts.of(more).map(<[u8]>::to_vec).collect();
            state.is_held = true;
        });
        self
    }

    /// Says what it has held back.
    pub fn go_on(&self) {
        let waiting = self.with(|state| {
            let held = std::mem::take(&mut state.held);
            state.pieces.extend(held);
            state.is_held = false;
            state.waiting.take()
        });
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }

    /// What was written to it.
    pub fn written(&self) -> Vec<u8> {
        self.with(|state| state.written.clone())
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsyncRead for Peer {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        self.with(|state| {
            let Some(mut piece) = state.pieces.pop_front() else {
                if state.is_held {
                    state.waiting = Some(context.waker().clone());
                    return Poll::Pending;
                }
                return Poll::Ready(Ok(()));
            };
            let rest = piece.split_off(piece.len().min(buffer.remaining()));
            buffer.put_slice(&piece);
            if !rest.is_empty() {
                state.pieces.push_front(rest);
            }
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Peer {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.with(|state| state.written.extend_from_slice(bytes));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs to the end, with timers.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime").block_on(future)
}
