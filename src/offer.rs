//! A connection that QEMU makes to us, as a client of NBD.
//!
//! ```text
//! socket pair, one end passed to QEMU         where descriptors can be passed
//! socket in a private directory, by path      elsewhere
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};

use crate::error::{Error, Kind, Result};
use crate::qemu::Qmp;
use crate::server::{close_to_others, pass_fd, private_dir, text};
use crate::teardown::{Teardown, Undo};

/// Where QEMU shall connect.
#[derive(Debug)]
pub(crate) struct Offer {
    /// The server, as `blockdev-add` takes it (QAPI `SocketAddress`).
    pub(crate) server: Value,
    /// Where it comes in.
    pub(crate) door: Door,
}

/// Our end of it.
#[derive(Debug)]
pub(crate) enum Door {
    Connected(UnixStream),
    Listening(UnixListener),
}

impl Door {
    /// QEMU's connection.
    pub(crate) async fn open(self) -> io::Result<UnixStream> {
        match self {
            Self::Connected(stream) => Ok(stream),
            Self::Listening(listener) => Ok(listener.accept().await?.0),
        }
    }
}

impl Offer {
    /// Makes one, with a socket below `runtime_dir` where it needs one.
    ///
    /// # Errors
    /// QEMU's; [`Kind::ScratchUnavailable`] for a directory that cannot be made.
    pub(crate) async fn make(
        qmp: &Qmp,
        runtime_dir: &Path,
        teardown: &mut Teardown,
    ) -> Result<Self> {
        let unusable = |error: io::Error| {
            Error::new(Kind::ScratchUnavailable, "making a socket for QEMU").because(error)
        };
        if qmp.can_pass_fds() {
            let (ours, theirs) = UnixStream::pair().map_err(unusable)?;
            // QEMU makes it non-blocking itself, as it likes.
            let name = pass_fd(qmp, theirs.as_fd()).await?;
            let server = json!({"type": "fd", "str": name});
            teardown.push(Undo::Fd { name });
            return Ok(Self {
                server,
                door: Door::Connected(ours),
            });
        }
        let dir = private_dir(runtime_dir)?;
        teardown.push(Undo::Directory(dir.clone()));
        let path = dir.join("push.sock");
        let listener = UnixListener::bind(&path).map_err(unusable)?;
        close_to_others(&path).await?;
        Ok(Self {
            server: json!({"type": "unix", "path": text(&path)?}),
            door: Door::Listening(listener),
        })
    }
}
