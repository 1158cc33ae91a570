//! Tests against the real QEMU.

mod discover;
#[path = "../support/machine.rs"]
mod machine;
mod nbd;
mod qmp;
mod session;
#[path = "../support/storage_daemon.rs"]
mod storage_daemon;

/// Ends a test that hangs.
async fn within(test: impl Future<Output = ()>) {
    let limit = std::time::Duration::from_secs(60);
    assert!(
        tokio::time::timeout(limit, test).await.is_ok(),
        "it hangs after {limit:?}"
    );
}
