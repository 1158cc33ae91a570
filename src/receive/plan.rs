//! What QEMU will write in an incremental: the changed granules, in whole clusters.

use crate::error::Result;
use crate::extent::Range;
use crate::nbd::{Client, Cursor, status};
use crate::qemu::step::CLUSTER;
use crate::view::View;

/// What comes next, in order of offset; steps are contiguous and never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Unchanged: QEMU does not write it.
    Same(Range),
    /// QEMU writes all up to here.
    Written(u64),
}

/// Steps from 0 to the disk's end.
#[derive(Debug)]
pub(super) struct Plan {
    clusters: Clusters,
    changes: Option<(Client, Cursor)>,
}

impl Plan {
    pub(super) async fn new(view: &View) -> Result<Self> {
        let changes = view.connect_changes().await?;
        let size = view.size();
        Ok(Self {
            clusters: Clusters { size, at: 0 },
            changes: changes.map(|client| (client, Cursor::new(0..size))),
        })
    }

    /// Of a full: QEMU writes all.
    #[cfg(test)]
    pub(super) fn full(size: u64) -> Self {
        Self {
            clusters: Clusters { size, at: 0 },
            changes: None,
        }
    }

    pub(super) async fn next(&mut self) -> Result<Option<Step>> {
        let Some((client, cursor)) = &mut self.changes else {
            let all = 0..self.clusters.size;
            return Ok(self.clusters.step(&all, true));
        };
        while let Some((range, flags)) = cursor.next(client).await? {
            let step = self.clusters.step(&range, status::is_dirty(flags));
            if step.is_some() {
                return Ok(step);
            }
        }
        Ok(None)
    }
}

/// Granules, which come in order, as whole clusters: one that has any dirty one is written.
#[derive(Debug)]
struct Clusters {
    size: u64,
    /// All before it is told.
    at: u64,
}

impl Clusters {
    fn step(&mut self, range: &Range, is_dirty: bool) -> Option<Step> {
        let end = if range.end == self.size {
            self.size
        } else if is_dirty {
            range.end.next_multiple_of(CLUSTER).min(self.size)
        } else {
            range.end / CLUSTER * CLUSTER
        };
        if end <= self.at {
            return None;
        }
        let start = std::mem::replace(&mut self.at, end);
        Some(if is_dirty {
            Step::Written(end)
        } else {
            Step::Same(start..end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECTOR: u64 = 512;

    /// For each cluster, whether it is told as written.
    fn told(size: u64, granules: &[(Range, bool)]) -> Vec<bool> {
        let mut clusters = Clusters { size, at: 0 };
        let (mut written, mut at) = (Vec::new(), 0);
        for (range, is_dirty) in granules {
            let Some(step) = clusters.step(range, *is_dirty) else {
                continue;
            };
            let (end, is_written) = match step {
                Step::Same(range) => {
                    assert_eq!(range.start, at);
                    (range.end, false)
                }
                Step::Written(end) => (end, true),
            };
            assert!(end > at && (end % CLUSTER == 0 || end == size), "{end}");
            let count = usize::try_from(end.div_ceil(CLUSTER) - at / CLUSTER).unwrap();
            written.extend(vec![is_written; count]);
            at = end;
        }
        assert_eq!(at, size);
        written
    }

    fn granules(size: u64, parts: &[(u64, bool)]) -> Vec<(Range, bool)> {
        let mut granules = Vec::new();
        let mut at = 0;
        for (sectors, is_dirty) in parts {
            let end = (at + sectors * SECTOR).min(size);
            if end > at {
                granules.push((at..end, *is_dirty));
            }
            at = end;
        }
        if at < size {
            granules.push((at..size, false));
        }
        granules
    }

    #[test]
    fn granules_that_are_smaller_than_a_cluster() {
        // Two in one cluster; two beside each other in two clusters; the disk's end.
        let size = 6 * CLUSTER - SECTOR;
        let dirty = [8..9, 16..17, 3 * 128 - 1..3 * 128 + 1, 767 - 1..767];
        let mut parts = Vec::new();
        let mut at = 0;
        for range in dirty {
            parts.push((range.start - at, false));
            parts.push((range.end - range.start, true));
            at = range.end;
        }
        let expected = [true, false, true, true, false, true];
        assert_eq!(told(size, &granules(size, &parts)), expected);
    }

    proptest! {
        /// QEMU writes a cluster exactly if a sector of it is dirty.
        #[test]
        fn a_cluster_is_written_if_any_of_it_is_dirty(
            sectors in 1u64..2000,
            parts in proptest::collection::vec((1u64..400, any::<bool>()), 0..20),
        ) {
            let size = sectors * SECTOR;
            let granules = granules(size, &parts);
            let clusters = usize::try_from(size.div_ceil(CLUSTER)).unwrap();
            let mut expected = vec![false; clusters];
            for (range, is_dirty) in &granules {
                for sector in range.start / SECTOR..range.end / SECTOR {
                    expected[usize::try_from(sector * SECTOR / CLUSTER).unwrap()] |= is_dirty;
                }
            }
            prop_assert_eq!(told(size, &granules), expected);
        }
    }
}
