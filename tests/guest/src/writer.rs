//! Background writers: what a busy guest does to its disks while a backup runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::{disk, number, pattern};

const BLOCK: u64 = 4096;

/// What to write.
pub enum Plan {
    /// Writes, zeros and discards all over a range.
    Random(Random),
    /// A counter into the first block of each target in turn: the first is never behind a
    /// later one, and never more than one ahead. A point in time must show the same.
    Count(Vec<File>),
}

pub struct Random {
    target: File,
    from: u64,
    to: u64,
    longest: u64,
    seed: u64,
    pause: Duration,
    discard_percent: u64,
    zero_percent: u64,
}

impl Plan {
    pub fn random(target: &str, options: &[&str]) -> io::Result<Plan> {
        let target = disk::open(target)?;
        let mut plan = Random {
            to: disk::size(&target)?,
            target,
            from: 0,
            longest: 64 << 10,
            seed: 1,
            pause: Duration::ZERO,
            discard_percent: 0,
            zero_percent: 0,
        };
        for option in options {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let value = number(value)?;
            match name {
                "from" => plan.from = value,
                "to" => plan.to = value,
                "longest" => plan.longest = value,
                "seed" => plan.seed = value,
                "pause_ms" => plan.pause = Duration::from_millis(value),
                "discard" => plan.discard_percent = value,
                "zero" => plan.zero_percent = value,
                _ => return Err(io::Error::other(format!("no option {name}"))),
            }
        }
        if plan.longest < BLOCK || plan.from + plan.longest > plan.to {
            return Err(io::Error::other(
                "the range has no room for a longest write",
            ));
        }
        Ok(Plan::Random(plan))
    }

    pub fn count(targets: &[&str]) -> io::Result<Plan> {
        let files: io::Result<Vec<File>> =
            targets.iter().map(|target| disk::open(target)).collect();
        Ok(Plan::Count(files?))
    }
}

#[derive(Default)]
struct Report {
    writes: u64,
    zeros: u64,
    discards: u64,
    bytes: u64,
    /// Longest write with its fdatasync since the last look.
    worst: Duration,
    error: Option<String>,
}

pub struct Writer {
    report: Arc<Mutex<Report>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub fn start(plan: Plan) -> Writer {
        let report = Arc::new(Mutex::new(Report::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (report, stop) = (report.clone(), stop.clone());
            move || {
                let result = match plan {
                    Plan::Random(plan) => write_randomly(&plan, &report, &stop),
                    Plan::Count(files) => write_counter(&files, &report, &stop),
                };
                report.lock().unwrap().error = result.err().map(|error| error.to_string());
            }
        });
        Writer {
            report,
            stop,
            thread: Some(thread),
        }
    }

    pub fn report(&self) -> io::Result<String> {
        let mut report = self.report.lock().unwrap();
        let worst = std::mem::take(&mut report.worst);
        let text = format!(
            "writes={} zeros={} discards={} bytes={} worst_us={}",
            report.writes,
            report.zeros,
            report.discards,
            report.bytes,
            worst.as_micros()
        );
        match &report.error {
            None => Ok(text),
            Some(error) => Err(io::Error::other(format!("{error}, after {text}"))),
        }
    }

    /// Returns when the write that is under way is done.
    pub fn stop(&mut self) -> io::Result<String> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_| io::Error::other("the writer panicked"))?;
        }
        self.report()
    }
}

fn write_randomly(plan: &Random, report: &Mutex<Report>, stop: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; plan.longest as usize];
    for step in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let random = |what: u64| pattern::word(plan.seed, step * 4 + what);
        let length = (random(0) % (plan.longest / BLOCK) + 1) * BLOCK;
        let places = (plan.to - plan.from - length) / BLOCK + 1;
        let offset = plan.from + random(1) % places * BLOCK;
        let dice = random(2) % 100;
        let began = Instant::now();
        if dice < plan.discard_percent {
            disk::discard(&plan.target, offset, length)?;
            report.lock().unwrap().discards += 1;
        } else if dice < plan.discard_percent + plan.zero_percent {
            // Both ways in which a guest makes zeros.
            let zero = if dice % 2 == 0 {
                disk::zero
            } else {
                disk::zeroout
            };
            zero(&plan.target, offset, length)?;
            report.lock().unwrap().zeros += 1;
        } else {
            let data = &mut buffer[..length as usize];
            pattern::fill(data, offset, random(3));
            plan.target.write_all_at(data, offset)?;
            plan.target.sync_data()?;
            let mut report = report.lock().unwrap();
            report.writes += 1;
            report.bytes += length;
        }
        note_time(report, began);
        thread::sleep(plan.pause);
    }
    Ok(())
}

fn write_counter(files: &[File], report: &Mutex<Report>, stop: &AtomicBool) -> io::Result<()> {
    for count in 1u64.. {
        let block = count.to_le_bytes().repeat(BLOCK as usize / 8);
        for file in files {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let began = Instant::now();
            file.write_all_at(&block, 0)?;
            file.sync_data()?;
            note_time(report, began);
        }
        let mut report = report.lock().unwrap();
        report.writes += 1;
        report.bytes += BLOCK * files.len() as u64;
    }
    Ok(())
}

fn note_time(report: &Mutex<Report>, began: Instant) {
    let mut report = report.lock().unwrap();
    report.worst = report.worst.max(began.elapsed());
}
