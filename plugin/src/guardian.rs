//! `qemu-fleece guardian`: the process that lets a guest go whatever becomes of the plugin,
//! which starts it and speaks with it over two pipes.

use std::fs::File;

use anyhow::Context;
use qemu_fleece_engine::guardian;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Serves who holds the guest, at the other end of the pipes, and returns when there is
/// nothing to watch over any more.
pub(crate) fn run(orders: File, words: File) -> anyhow::Result<()> {
    // Away from what kills the plugin with its group or its terminal. Started in another way
    // it may lead a group, which cannot be left; signals that ask are obeyed all the same.
    let _leader = rustix::process::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let orders = pipe::Receiver::from_file(orders).context("standard input")?;
        let words = pipe::Sender::from_file(words).context("standard output")?;
        let end = CancellationToken::new();
        for kind in [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::hangup(),
        ] {
            let (mut told, end) = (signal(kind)?, end.clone());
            tokio::spawn(async move {
                told.recv().await;
                end.cancel();
            });
        }
        guardian::watch(orders, words, end).await;
        Ok(())
    })
}
