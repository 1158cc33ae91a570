//! Lists the extents of an export as a pull does: `extents SOCKET EXPORT`.
//! Prints their number, the seconds it took, and the most memory it had.

#![allow(clippy::print_stdout, reason = "it is what it is for")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use qemu_fleece_engine::Result;
use qemu_fleece_engine::nbd::{Address, Client};

/// As in a pull.
const STEP: u64 = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let socket = PathBuf::from(arguments.next().unwrap_or_default());
    let export = arguments.next().unwrap_or_default();
    let client = Client::connect(
        &Address::Unix(socket),
        &export,
        Some("base:allocation"),
        Duration::from_secs(10),
    )
    .await?;
    let started = Instant::now();
    let (mut offset, mut extents, size) = (0, 0, client.export().size);
    while offset < size {
        let known = client
            .submit_block_status(offset, STEP.min(size - offset))
            .await?
            .await?;
        extents += known.len();
        offset += known.iter().map(|(length, _)| length).sum::<u64>();
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap_or_default();
    println!(
        "{extents} extents in {:.2} s, {memory}",
        started.elapsed().as_secs_f64()
    );
    client.close().await;
    Ok(())
}
