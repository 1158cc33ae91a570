//! One restore: records from the host, checked, written by the engine.
//!
//! A task owns it. Its requests come through one queue, so records are taken in
//! the order of their lines.

use qemu_fleece_engine::restore::Restore;
use qemu_fleece_protocol::backup::AbortResult;
use qemu_fleece_protocol::error::StateLeft;
use qemu_fleece_protocol::restore::{RestoreFinishResult, RestoreWriteResult};
use qemu_fleece_protocol::stream::{Chain, Damage};
use qemu_fleece_protocol::{Code, MAX_REQUESTS, Record, WireError};
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};

use crate::requests::to_raw;
use crate::wire;

/// The answer to one request of a restore.
pub(crate) type Answer = oneshot::Sender<Result<Box<RawValue>, WireError>>;

/// A request of a restore.
#[derive(Debug)]
pub(crate) enum Order {
    Write(Record, Option<Vec<u8>>, Answer),
    Finish(Answer),
    Abort(Answer),
}

/// Starts the task of a restore to `target`.
pub(crate) fn spawn(restore: Restore, target: String) -> mpsc::Sender<Order> {
    // As many as can be unanswered: the loop never waits here.
    let (sender, receiver) = mpsc::channel(MAX_REQUESTS);
    let task = Task {
        restore,
        target,
        chain: Chain::new(),
        data_bytes: 0,
    };
    tokio::spawn(task.run(receiver));
    sender
}

struct Task {
    restore: Restore,
    target: String,
    chain: Chain,
    data_bytes: u64,
}

impl Task {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Write(record, payload, answer) => {
                    match self.write(&record, payload.as_deref()).await {
                        Ok(()) => {
                            let result = RestoreWriteResult {
                                offset: self.chain.offset(),
                            };
                            let _gone = answer.send(to_raw(result));
                        }
                        Err(error) => return self.end(orders, answer, error).await,
                    }
                }
                Order::Finish(answer) => return self.finish(orders, answer).await,
                Order::Abort(answer) => {
                    orders.close();
                    let leftovers = self.restore.abort().await;
                    let _gone = answer.send(to_raw(AbortResult { leftovers }));
                    return;
                }
            }
        }
        // Every sender is gone: the process ends.
        let leftovers = self.restore.abort().await;
        if !leftovers.is_empty() {
            tracing::warn!(?leftovers, "left behind by a restore");
        }
    }

    async fn write(&mut self, record: &Record, payload: Option<&[u8]>) -> Result<(), WireError> {
        let first = self.chain.complete() == 0;
        if let Record::Begin(begin) = record
            && begin.size != self.restore.size()
        {
            let what = format!(
                "its disk has {} bytes, and the target {}",
                begin.size,
                self.restore.size()
            );
            return Err(damaged(&Damage {
                stream: self.chain.complete(),
                offset: 0,
                what,
            }));
        }
        self.chain
            .take(record, payload)
            .map_err(|damage| damaged(&damage))?;
        let written = match (record, payload) {
            (Record::Data { offset, length, .. }, Some(bytes)) => {
                self.data_bytes += length;
                self.restore.write(*offset, bytes).await
            }
            // A new image reads as zeros, and writing them would cost it metadata.
            (Record::Zero { .. }, _) if first => Ok(()),
            (Record::Zero { offset, length, .. }, _) => {
                self.restore.zero(*offset..*offset + *length).await
            }
            (Record::End(_), _) => self.restore.barrier().await,
            _ => Ok(()),
        };
        written.map_err(|error| wire::to_error(&error, StateLeft::Aborted))
    }

    async fn finish(self, mut orders: mpsc::Receiver<Order>, answer: Answer) {
        orders.close();
        let last = match self.chain.finish() {
            Ok(last) => last.clone(),
            Err(damage) => return self.end(orders, answer, damaged(&damage)).await,
        };
        let result = RestoreFinishResult {
            target: self.target,
            size: last.size,
            streams: self.chain.complete(),
            data_bytes: self.data_bytes,
            checkpoint: last.checkpoint,
        };
        let finished = self
            .restore
            .finish()
            .await
            .map_err(|error| wire::to_error(&error, StateLeft::Aborted));
        let _gone = answer.send(finished.and_then(|()| to_raw(result)));
    }

    /// Ends as by abort; orders that wait find no restore.
    async fn end(self, mut orders: mpsc::Receiver<Order>, answer: Answer, mut error: WireError) {
        orders.close();
        error.data.leftovers.extend(self.restore.abort().await);
        let _gone = answer.send(Err(error));
    }
}

fn damaged(damage: &Damage) -> WireError {
    let mut error =
        WireError::new(Code::StreamDamaged, damage.to_string()).left(StateLeft::Aborted);
    error.data.stream = Some(damage.stream);
    error.data.offset = Some(damage.offset);
    error
}
