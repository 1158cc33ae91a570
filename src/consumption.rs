//! How far one disk's view is consumed: who works on it, and what of it is still there.
//! Pure: [`crate::view`] does what is decided here.
//!
//! ```text
//!            claim                        stop
//! idle ----------------> pull ------------------------> idle, from `released` on
//!   |                    push, map -------------------> idle, spent if it gave back
//!   \-- lend --> exported: others read all of it, beside whoever works on it
//! ```
//! What is given back is gone: it only grows, from the start of the disk on.

use crate::checkpoint::GRANULARITY;
use crate::error::{Error, Kind, Result};
use crate::extent::{Range, inner_aligned};
use crate::saved::Progress;

/// What works on a view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Work {
    #[default]
    None,
    /// A pull: what it has read can be given back.
    Pull,
    /// A push or a map: it needs all, to its end.
    Whole,
}

/// Where a disk's stream stands.
#[derive(Debug)]
pub(crate) struct Consumption {
    /// The disk's bytes.
    size: u64,
    /// Whose it is now.
    work: Work,
    /// A stream reached the end of the disk, or a push is done.
    pub(crate) complete: bool,
    /// The host reads it by itself.
    pub(crate) exported: bool,
    /// What did not change since the base was given back.
    pub(crate) partial: bool,
    /// A push gives back what it has written: no second one can follow.
    pub(crate) spent: bool,
    /// A stream gives back what it reads: after a crash nobody knows how far it was.
    pub(crate) flowing: bool,
    /// The view before this offset is given back; 0: none of it.
    pub(crate) released: u64,
    /// Where the stream can go on, in the words of whoever streams.
    mark: Option<String>,
}

/// What nobody may read any more, before QEMU knows of it.
#[derive(Debug)]
#[must_use]
pub struct Released {
    /// All before it is given back.
    pub offset: u64,
    /// What QEMU can forget now.
    pub(crate) range: Range,
}

impl Consumption {
    /// Nothing of a disk of `size` bytes is consumed.
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            work: Work::None,
            complete: false,
            exported: false,
            partial: false,
            spent: false,
            flowing: false,
            released: 0,
            mark: None,
        }
    }

    /// Makes it what it was in a process that has ended.
    pub(crate) fn resume(&mut self, progress: &Progress) {
        self.complete = progress.complete;
        self.exported = progress.exported;
        self.partial = progress.partial;
        self.spent = progress.spent;
        self.released = progress.released;
        self.mark.clone_from(&progress.mark);
    }

    /// What a process needs to know that takes over at `time_ms`, milliseconds since 1970 UTC.
    pub(crate) fn progress(&self, time_ms: u64) -> Progress {
        Progress {
            time_ms,
            released: self.released,
            mark: self.mark.clone(),
            complete: self.complete,
            exported: self.exported,
            spent: self.spent || self.flowing,
            partial: self.partial,
        }
    }

    /// Where a stream can start, and what the one before it left to go on by; `None`:
    /// nowhere.
    pub(crate) fn start(&self) -> Option<(u64, Option<String>)> {
        (!self.spent).then(|| (self.released, self.mark.clone()))
    }

    /// Claims it for `work` that starts at `offset`.
    ///
    /// # Errors
    /// [`Kind::StreamActive`], [`Kind::OffsetReleased`] with the offset to start at, where there
    /// is one.
    pub(crate) fn claim(&mut self, offset: u64, work: Work) -> Result<()> {
        let doing = "starting a stream";
        if self.work != Work::None {
            return Err(Error::new(Kind::StreamActive, doing));
        }
        if self.spent {
            return Err(Error::new(Kind::OffsetReleased, doing)
                .because("a push has given back what it wrote"));
        }
        if offset != self.released {
            return Err(Error::new(Kind::OffsetReleased, doing)
                .because(format!("it can start at {} only", self.released))
                .at(self.released));
        }
        self.work = work;
        Ok(())
    }

    /// Whether a push works on it, or has given back what it wrote.
    pub(crate) fn is_pushed(&self) -> bool {
        self.spent || self.work == Work::Whole
    }

    /// Nobody works on it any more.
    pub(crate) fn stop(&mut self) {
        self.work = Work::None;
    }

    /// Lets others read it too, to its end.
    ///
    /// # Errors
    /// As of [`Consumption::check_whole`].
    pub(crate) fn lend(&mut self) -> Result<()> {
        self.check_whole()?;
        self.exported = true;
        Ok(())
    }

    /// Whether all of it is there still, for others to read.
    ///
    /// # Errors
    /// [`Kind::OffsetReleased`].
    pub(crate) fn check_whole(&self) -> Result<()> {
        if self.spent || self.released > 0 {
            return Err(
                Error::new(Kind::OffsetReleased, "exporting a point in time")
                    .because("a part of it was given back")
                    .at(self.released),
            );
        }
        Ok(())
    }

    /// Whether the host can say what it has of it; and whether it can be any part, because it
    /// reads it by itself.
    ///
    /// # Errors
    /// [`Kind::StreamActive`] where that would take it away under a stream.
    pub(crate) fn check_release(&self) -> Result<bool> {
        match (self.work, self.exported) {
            (Work::None, exported) => Ok(exported),
            (Work::Pull, false) => Ok(false),
            _ => Err(Error::new(
                Kind::StreamActive,
                "giving back a part of the view",
            )),
        }
    }

    /// The host has, or wants no more, what lies before `offset`. A stream can go on there by
    /// `mark`, where it has one. What is given back by now: all before `offset`, or more.
    ///
    /// # Errors
    /// As of [`Consumption::check_release`].
    pub(crate) fn release(&mut self, offset: u64, mark: Option<String>) -> Result<Released> {
        self.check_release()?;
        if offset > self.released && mark.is_some() {
            self.mark = mark;
        }
        Ok(self.pass(offset))
    }

    /// A pull has handed over all before `offset`: what it gives back once `least` bytes or
    /// more have come together; nothing of what others read too.
    pub(crate) fn release_in_steps(&mut self, offset: u64, least: u64) -> Option<Released> {
        let is_time = !self.exported && offset.saturating_sub(self.released) >= least;
        is_time.then(|| self.pass(offset))
    }

    /// Whole granules only: a part of one goes with the next release.
    fn pass(&mut self, offset: u64) -> Released {
        let from = self.released;
        self.released = from.max(offset);
        let start = from / GRANULARITY * GRANULARITY;
        Released {
            offset: self.released,
            range: if offset > from {
                inner_aligned(&(start..offset), GRANULARITY, self.size)
            } else {
                0..0
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = GRANULARITY;
    /// Ten granules and a part.
    const SIZE: u64 = 10 * G + 512;

    fn kind<T: std::fmt::Debug>(result: Result<T>) -> Kind {
        result.unwrap_err().kind()
    }

    #[test]
    fn a_stream_starts_where_the_one_before_it_was_acknowledged() {
        let mut view = Consumption::new(SIZE);
        assert_eq!(view.start(), Some((0, None)));
        view.claim(0, Work::Pull).unwrap();
        assert_eq!(kind(view.claim(0, Work::Pull)), Kind::StreamActive);
        let released = view.release(3 * G + 1, Some("a".into())).unwrap();
        assert_eq!((released.offset, released.range), (3 * G + 1, 0..3 * G));
        // What lies behind changes neither the place nor how to go on.
        let released = view.release(G, Some("b".into())).unwrap();
        assert_eq!((released.offset, released.range), (3 * G + 1, 0..0));
        assert_eq!(view.start(), Some((3 * G + 1, Some("a".into()))));
        view.stop();
        for wrong in [0, 3 * G, 3 * G + 2, SIZE] {
            let error = view.claim(wrong, Work::Pull).unwrap_err();
            assert_eq!(error.kind(), Kind::OffsetReleased);
            assert_eq!(error.offset(), Some(3 * G + 1));
        }
        view.claim(3 * G + 1, Work::Pull).unwrap();
        // The granule that was cut goes now, and the last one though it is short.
        let released = view.release(SIZE, None).unwrap();
        assert_eq!((released.offset, released.range), (SIZE, 3 * G..SIZE));
    }

    #[test]
    fn nothing_is_given_back_under_who_needs_it() {
        let mut pushed = Consumption::new(SIZE);
        pushed.claim(0, Work::Whole).unwrap();
        assert_eq!(kind(pushed.release(G, None)), Kind::StreamActive);
        let mut exported = Consumption::new(SIZE);
        exported.lend().unwrap();
        assert!(exported.check_release().unwrap());
        exported.claim(0, Work::Pull).unwrap();
        assert_eq!(kind(exported.release(G, None)), Kind::StreamActive);
        assert!(exported.release_in_steps(SIZE, 1).is_none());
        assert_eq!(exported.start(), Some((0, None)));
    }

    #[test]
    fn what_is_not_whole_is_lent_to_nobody() {
        let mut released = Consumption::new(SIZE);
        let _ = released.release(1, None).unwrap();
        let mut spent = Consumption::new(SIZE);
        spent.spent = true;
        for mut view in [released, spent] {
            assert_eq!(kind(view.lend()), Kind::OffsetReleased);
            assert!(!view.exported);
        }
    }

    #[test]
    fn a_pull_gives_back_in_steps() {
        let mut view = Consumption::new(SIZE);
        view.claim(0, Work::Pull).unwrap();
        assert!(view.release_in_steps(2 * G - 1, 2 * G).is_none());
        let released = view.release_in_steps(2 * G, 2 * G).unwrap();
        assert_eq!((released.offset, released.range), (2 * G, 0..2 * G));
        assert!(view.release_in_steps(3 * G, 2 * G).is_none());
    }

    #[test]
    fn a_process_that_takes_over_finds_it_as_it_was() {
        let mut view = Consumption::new(SIZE);
        view.partial = true;
        let _ = view.release(2 * G, Some("mark".into())).unwrap();
        let mut taken = Consumption::new(SIZE);
        taken.resume(&view.progress(1));
        assert_eq!(taken.progress(1), view.progress(1));
        assert_eq!(taken.start(), Some((2 * G, Some("mark".into()))));
        // How far a stream was that gives back by itself, nobody knows.
        view.flowing = true;
        taken.resume(&view.progress(1));
        assert_eq!(taken.start(), None);
        assert_eq!(kind(taken.claim(2 * G, Work::Pull)), Kind::OffsetReleased);
    }
}
