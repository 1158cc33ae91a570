//! Calls to file systems. Any of them may hang, on a network's file system say, and none
//! may hold up the one thread that all else runs on: each has a thread of its own.
//!
//! ```text
//! caller --call--> thread --> file system
//!        <-- what it returns, or: it hangs. The thread goes on, and drops what comes late
//! ```

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Mutex;

use crate::error::{Error, Kind, Result};

/// How long a file system gets to remove or to close something.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);

/// What `call` returns, however long it takes.
///
/// # Errors
/// The call's.
pub(crate) async fn unbounded<T: Send + 'static>(
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let called = tokio::task::spawn_blocking(call).await;
    called.unwrap_or_else(|panic| {
        Err(Error::new(Kind::Internal, "calling a file system").because(panic))
    })
}

/// What `call` returns within `deadline`.
///
/// # Errors
/// The call's; [`Kind::TargetTimeout`]: it goes on then, and what it does may still be done.
pub(crate) async fn within<T: Send + 'static>(
    deadline: Duration,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let called = tokio::time::timeout(deadline, unbounded(call)).await;
    called.unwrap_or_else(|_elapsed| Err(hangs(deadline)))
}

/// An open file whose calls are made one at a time, so that one which hangs takes one thread.
#[derive(Debug)]
pub struct Held {
    /// `None` once it is closed.
    file: Option<Arc<Mutex<File>>>,
}

impl Held {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file: Some(Arc::new(Mutex::new(file))),
        }
    }

    /// What `call` returns within `deadline`.
    ///
    /// # Errors
    /// The call's; [`Kind::TargetTimeout`], also where an earlier one hangs: it goes on then.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        deadline: Duration,
        call: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(file) = self.file.clone() else {
            return Err(Error::new(Kind::Internal, "calling a file that is closed"));
        };
        let called = async {
            let file = file.lock_owned().await;
            unbounded(move || call(&file).map_err(failed)).await
        };
        let called = tokio::time::timeout(deadline, called).await;
        called.unwrap_or_else(|_elapsed| Err(hangs(deadline)))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Closing is a call like any other: not for this thread.
        if let (Some(file), Ok(runtime)) = (self.file.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(file));
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::new(Kind::Internal, "calling a file system").because(error)
}

fn hangs(deadline: Duration) -> Error {
    Error::new(Kind::TargetTimeout, "calling a file system").because(format!(
        "it hangs: no answer for {} s",
        deadline.as_secs_f32()
    ))
}

/// Removes what is at `path` with `remove`, if there is anything.
///
/// # Errors
/// [`Kind::TargetTimeout`]; [`Kind::Internal`] with the file system's error.
pub(crate) async fn remove(path: &Path, remove: fn(&Path) -> io::Result<()>) -> Result<()> {
    let path = path.to_owned();
    let call = move || match path.symlink_metadata().and_then(|_there| remove(&path)) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(Error::new(Kind::Internal, "removing a file").because(error))
        }
        _ => Ok(()),
    };
    within(RELEASE_DEADLINE, call).await
}

/// Closes a file: some file systems write what is left then.
pub(crate) async fn close(file: File) {
    let closed = within(RELEASE_DEADLINE, move || {
        drop(file);
        Ok(())
    });
    if let Err(error) = closed.await {
        tracing::warn!(error = error.chain(), "could not close a file");
    }
}
