use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// Takes writes of a MiB until it holds so many bytes.
fn fill(flow: &Arc<Flow>, bytes: u64) -> Vec<Held> {
    (0..bytes / MIB)
        .map(|number| flow.take(number * MIB, MIB).unwrap())
        .collect()
}

/// Whether somebody who waits for a change is told of one.
async fn has_changed(flow: &Flow) -> bool {
    let soon = std::time::Duration::from_millis(20);
    tokio::time::timeout(soon, flow.changed()).await.is_ok()
}

#[tokio::test]
async fn a_job_is_paused_above_high_and_goes_on_below_low() {
    let flow = Flow::new();
    assert!(flow.is_low() && !flow.is_high());
    let mut held = fill(&flow, HIGH);
    assert!(!flow.is_low() && !flow.is_high());
    assert!(!has_changed(&flow).await);
    held.push(flow.take(HIGH, MIB).unwrap());
    assert!(flow.is_high());
    assert!(has_changed(&flow).await);
    held.truncate(usize::try_from(LOW / MIB).unwrap());
    assert!(!flow.is_low() && !flow.is_high());
    assert!(!has_changed(&flow).await);
    held.pop();
    assert!(flow.is_low());
    assert!(has_changed(&flow).await);
}

#[tokio::test]
async fn a_change_while_nobody_looks_is_not_missed() {
    let flow = Flow::new();
    let held = fill(&flow, HIGH + MIB);
    assert!(has_changed(&flow).await);
    drop(held);
    assert!(has_changed(&flow).await);
}

/// A hole of a terabyte is a million writes without a byte.
#[test]
fn zeros_count() {
    let flow = Flow::new();
    let mut held = Vec::new();
    while !flow.is_high() {
        held.push(flow.take(held.len() as u64 * MIB, 0).unwrap());
        assert!(held.len() < 10_000);
    }
    while let Some(more) = flow.take(held.len() as u64 * MIB, 0) {
        held.push(more);
        assert!(held.len() < 100_000);
    }
}

#[test]
fn it_is_bounded_but_for_the_write_that_is_waited_for() {
    let flow = Flow::new();
    let held = fill(&flow, MOST);
    assert!(!flow.is_starving());
    for bytes in [0, 1, MIB] {
        assert!(flow.take(0, bytes).is_none());
    }
    flow.wait_for(Some(0));
    flow.wait_for(None);
    assert!(!flow.is_starving());
    assert!(flow.take(0, MIB).is_none());
    flow.wait_for(Some(0));
    assert!(flow.is_starving());
    assert!(flow.take(MIB, MIB).is_none());
    let awaited = flow.take(0, MIB).unwrap();
    // Once.
    assert!(!flow.is_starving());
    assert!(flow.take(0, 0).is_none());
    drop((held, awaited));
    assert!(flow.take(0, 0).is_some());
    assert_eq!(flow.held(), 0);
}

proptest! {
    /// What is held is the sum of what was taken and not dropped, and never too much.
    #[test]
    fn as_a_naive_sum(steps in proptest::collection::vec((any::<bool>(), 0..=MIB), 0..400)) {
        let flow = Flow::new();
        let mut held: Vec<Held> = Vec::new();
        for (takes, bytes) in steps {
            let sum: u64 = held.iter().map(|one| one.bytes).sum();
            prop_assert_eq!(flow.held(), sum);
            prop_assert!(sum <= MOST);
            prop_assert_eq!((flow.is_low(), flow.is_high()), (sum < LOW, sum > HIGH));
            if takes || held.is_empty() {
                let taken = flow.take(0, bytes);
                prop_assert_eq!(taken.is_some(), sum + bytes.max(LEAST) <= MOST);
                held.extend(taken);
            } else {
                let any = usize::try_from(bytes).unwrap() % held.len();
                held.swap_remove(any);
            }
        }
    }
}
