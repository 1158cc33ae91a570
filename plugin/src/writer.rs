//! Standard output: one thread writes all lines, and what follows them.

use std::fs::File;
use std::io::{BufWriter, IoSlice, Write};

use qemu_fleece_engine::chunk::Slice;
use tokio::sync::{mpsc, oneshot};

/// Lines that wait to be written, payloads with them.
const QUEUE: usize = 32;

/// What a pipe to the host may hold: 64 KiB, the default, halves the throughput.
const PIPE_BYTES: usize = 1024 * 1024;

/// The same for a socket.
const SOCKET_BYTES: usize = 4 * 1024 * 1024;

/// Bytes of lines that go out together.
const GATHER_BYTES: usize = 64 * 1024;

/// A line, with its `\n`, and the bytes behind it.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) line: Vec<u8>,
    pub(crate) payload: Option<Slice>,
    /// Told once this frame and all before it are written.
    pub(crate) written: Option<oneshot::Sender<()>>,
}

impl From<Vec<u8>> for Frame {
    fn from(line: Vec<u8>) -> Self {
        Self {
            line,
            payload: None,
            written: None,
        }
    }
}

/// Where frames go in.
pub(crate) type Outlet = mpsc::Sender<Frame>;

/// Starts the thread. The outlet closes when standard output does.
pub(crate) fn spawn(stdout: File) -> std::io::Result<Outlet> {
    // Only faster with it: a file or a terminal refuses, and that is well.
    let _refused = rustix::pipe::fcntl_setpipe_size(&stdout, PIPE_BYTES);
    let _refused = rustix::net::sockopt::set_socket_send_buffer_size(&stdout, SOCKET_BYTES);
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::Builder::new()
        .name("stdout".into())
        .spawn(move || write(stdout, receiver))?;
    Ok(sender)
}

fn write(stdout: File, mut frames: mpsc::Receiver<Frame>) {
    // Gathers lines as long as more wait; large payloads pass through uncopied.
    let mut stdout = BufWriter::with_capacity(GATHER_BYTES, stdout);
    while let Some(frame) = frames.blocking_recv() {
        let payload: &[u8] = frame.payload.as_deref().unwrap_or_default();
        let mut slices = [IoSlice::new(&frame.line), IoSlice::new(payload)];
        let mut written = write_all(&mut stdout, &mut slices);
        if frames.is_empty() || frame.written.is_some() {
            written = written.and_then(|()| stdout.flush());
        }
        if let Err(error) = written {
            tracing::error!(%error, "writing standard output");
            return;
        }
        if let Some(told) = frame.written {
            // Who asked may be gone.
            let _gone = told.send(());
        }
    }
}

fn write_all(stdout: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> std::io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stdout.write_vectored(slices) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(length) => IoSlice::advance_slices(&mut slices, length),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
