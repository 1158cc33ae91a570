//! Jobs: how they end.

use std::time::Duration;

use qapi::qmp::{job_cancel, job_dismiss, job_finalize};
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::error::{Error, Kind, Result};
use crate::qemu::query::{self, Job};
use crate::qemu::{Event, Qmp};

/// Cancels the job `id`, waits until it is concluded, and dismisses it; does
/// nothing where there is none.
///
/// # Errors
/// [`Kind::QemuTimeout`]; the monitor's.
pub async fn cancel(qmp: &Qmp, id: &str, deadline: Duration) -> Result<()> {
    let turn = qmp.turn().await;
    let qmp = &*turn;
    let mut events = qmp.events();
    let Some(job) = find(qmp, id).await? else {
        return Ok(());
    };
    if job.status != "concluded" {
        // It may conclude before the command comes; what it is then decides.
        let cancelled = qmp.execute(&job_cancel { id: id.to_owned() }).await;
        let job = concluded(qmp, &mut events, id, deadline).await;
        match (cancelled, job) {
            (_, Ok(Some(_))) => {}
            (_, Ok(None)) => return Ok(()),
            (Err(refused), Err(_)) => return Err(refused),
            (Ok(_), Err(error)) => return Err(error),
        }
    }
    qmp.execute(&job_dismiss { id: id.to_owned() })
        .await
        .map(drop)
}

/// Lets the job `id`, which is pending, do what it does at its end; waits until it is
/// concluded, and dismisses it.
///
/// # Errors
/// [`Kind::QemuRefused`] with the job's own error; [`Kind::QemuTimeout`]; the monitor's.
pub async fn finalize(qmp: &Qmp, id: &str, deadline: Duration) -> Result<()> {
    let turn = qmp.turn().await;
    let mut events = turn.events();
    turn.execute(&job_finalize { id: id.to_owned() }).await?;
    let job = concluded(&turn, &mut events, id, deadline).await?;
    let dismissed = turn.execute(&job_dismiss { id: id.to_owned() }).await;
    match job.and_then(|job| job.error) {
        Some(error) => {
            Err(Error::new(Kind::QemuRefused, format!("ending job {id}")).because(error))
        }
        None => dismissed.map(drop),
    }
}

/// Waits until the job is concluded (`Some`) or gone (`None`). Each event is only
/// an occasion to look: one that was missed costs nothing.
async fn concluded(
    qmp: &Qmp,
    events: &mut broadcast::Receiver<Event>,
    id: &str,
    deadline: Duration,
) -> Result<Option<Job>> {
    let end = Instant::now() + deadline;
    loop {
        match find(qmp, id).await? {
            Some(job) if job.status != "concluded" => {}
            found => return Ok(found),
        }
        loop {
            let received =
                tokio::time::timeout_at(end, events.recv())
                    .await
                    .map_err(|_elapsed| {
                        Error::new(
                            Kind::QemuTimeout,
                            format!("waiting for the end of job {id}"),
                        )
                        .because(format!("it goes on after {} s", deadline.as_secs()))
                    })?;
            match received {
                Ok(event) if event.name == "JOB_STATUS_CHANGE" && event.data["id"] == id => break,
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => break,
                Err(broadcast::error::RecvError::Closed) => {
                    return Err(Error::new(
                        Kind::MonitorClosed,
                        format!("waiting for the end of job {id}"),
                    ));
                }
            }
        }
    }
}

async fn find(qmp: &Qmp, id: &str) -> Result<Option<Job>> {
    Ok(query::jobs(qmp).await?.into_iter().find(|job| job.id == id))
}
