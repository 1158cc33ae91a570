//! What QEMU says of a push's job, unasked.

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::Instant;

use crate::qemu::Event;

/// The events of one job.
#[derive(Debug)]
pub(super) struct JobEvents {
    events: Receiver<Event>,
    job: String,
    read_failed: bool,
}

impl JobEvents {
    /// Of those that come from now on to `events`, the ones of `job`.
    pub(super) fn new(events: Receiver<Event>, job: String) -> Self {
        Self {
            events,
            job,
            read_failed: false,
        }
    }

    /// Whether the job has said by now that it could not read.
    pub(super) fn read_failed(&mut self) -> bool {
        loop {
            match self.events.try_recv() {
                Ok(event) => drop(self.heed(&event)),
                // What is left comes next.
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return self.read_failed,
            }
        }
    }

    /// Returns once it says something, or may have said something that was missed; at `end`
    /// at the latest.
    pub(super) async fn next(&mut self, end: Instant) {
        loop {
            match tokio::time::timeout_at(end, self.events.recv()).await {
                Ok(Ok(event)) if self.heed(&event) => return,
                Ok(Ok(_)) => {}
                Ok(Err(RecvError::Lagged(_))) | Err(_) => return,
                // No more will come.
                Ok(Err(RecvError::Closed)) => return tokio::time::sleep_until(end).await,
            }
        }
    }

    /// Whether an event is of the job.
    fn heed(&mut self, event: &Event) -> bool {
        match event.name.as_str() {
            "BLOCK_JOB_ERROR" if event.data["device"] == self.job => {
                self.read_failed |= event.data["operation"] == "read";
                true
            }
            "JOB_STATUS_CHANGE" => event.data["id"] == self.job,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use tokio::sync::broadcast;

    use super::*;

    const JOB: &str = "qf-session-0-push";
    /// Events that are kept for who lags.
    const KEPT: usize = 4;

    fn event(name: &str, data: serde_json::Value) -> Event {
        Event {
            name: name.into(),
            data,
        }
    }

    fn error(device: &str, operation: &str) -> Event {
        let data = json!({"device": device, "operation": operation, "action": "stop"});
        event("BLOCK_JOB_ERROR", data)
    }

    fn noise() -> Event {
        event("RTC_CHANGE", json!({"offset": 0}))
    }

    fn events() -> (broadcast::Sender<Event>, JobEvents) {
        let (sender, events) = broadcast::channel(KEPT);
        (sender, JobEvents::new(events, JOB.into()))
    }

    const SOON: Duration = Duration::from_millis(50);
    const PATIENT: Duration = Duration::from_secs(60);

    /// Whether something of the job is told before the time is up.
    async fn is_told(events: &mut JobEvents, time: Duration) -> bool {
        let end = Instant::now() + time;
        events.next(end).await;
        Instant::now() < end
    }

    #[tokio::test]
    async fn errors_of_the_jobs_own_reads_count() {
        let (sender, mut events) = events();
        sender.send(error(JOB, "write")).unwrap();
        sender.send(error("theirs", "read")).unwrap();
        sender.send(noise()).unwrap();
        assert!(!events.read_failed());
        sender.send(error(JOB, "read")).unwrap();
        sender.send(error(JOB, "write")).unwrap();
        assert!(events.read_failed());
        // It stays so.
        assert!(events.read_failed());
    }

    #[tokio::test]
    async fn an_error_that_was_heard_while_waiting_is_remembered() {
        let (sender, mut events) = events();
        sender.send(error(JOB, "read")).unwrap();
        assert!(is_told(&mut events, PATIENT).await);
        assert!(events.read_failed());
    }

    #[tokio::test]
    async fn who_lags_hears_what_is_left() {
        let (sender, mut events) = events();
        for _ in 0..KEPT {
            sender.send(noise()).unwrap();
        }
        sender.send(error(JOB, "read")).unwrap();
        assert!(events.read_failed());
    }

    #[tokio::test]
    async fn it_waits_for_the_job_only() {
        let (sender, mut events) = events();
        sender.send(noise()).unwrap();
        assert!(!is_told(&mut events, SOON).await);
        let status = |id: &str| event("JOB_STATUS_CHANGE", json!({"id": id, "status": "paused"}));
        sender.send(status("theirs")).unwrap();
        assert!(!is_told(&mut events, SOON).await);
        sender.send(status(JOB)).unwrap();
        assert!(is_told(&mut events, PATIENT).await);
        // Something may have been missed.
        for _ in 0..=KEPT {
            sender.send(noise()).unwrap();
        }
        assert!(is_told(&mut events, PATIENT).await);
        drop(sender);
        assert!(!is_told(&mut events, SOON).await);
    }
}
