//! Disks by serial number, and what can be done to a range of one (or of a file).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use crate::pattern;

const STEP: usize = 1 << 20;

const BLKFLSBUF: u64 = 0x1261;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKGETSIZE64: u64 = 0x8008_1272;
const FALLOC_FL_KEEP_SIZE: i32 = 1;
const FALLOC_FL_PUNCH_HOLE: i32 = 2;
const FALLOC_FL_ZERO_RANGE: i32 = 16;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, argument: *mut u64) -> i32;
    fn fallocate64(fd: i32, mode: i32, offset: i64, length: i64) -> i32;
}

/// Serial number and device path of each disk that has a serial number.
pub fn all() -> io::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        // A path of a multipath NVMe disk is listed too, but cannot be opened.
        if !fs::exists(format!("/dev/{name}"))? {
            continue;
        }
        // In order: virtio-blk, NVMe, SCSI (vital product data, after a 4-byte header).
        let serial = [("serial", 0), ("device/serial", 0), ("device/vpd_pg80", 4)]
            .iter()
            .find_map(|(file, skip)| {
                let bytes = fs::read(format!("/sys/block/{name}/{file}")).ok()?;
                Some(
                    String::from_utf8_lossy(bytes.get(*skip..)?)
                        .trim()
                        .to_string(),
                )
            });
        if let Some(serial) = serial.filter(|serial| !serial.is_empty()) {
            found.push((serial, format!("/dev/{name}")));
        }
    }
    found.sort();
    Ok(found)
}

/// The path of a target: a path as it is, or a disk's serial number.
pub fn path(target: &str) -> io::Result<String> {
    if target.starts_with('/') {
        return Ok(target.into());
    }
    let disk = all()?.into_iter().find(|(serial, _)| serial == target);
    disk.map(|(_, path)| path)
        .ok_or_else(|| io::Error::other(format!("no disk {target}")))
}

pub fn open(target: &str) -> io::Result<File> {
    let path = path(target)?;
    // A device that is not there must not become a file in /dev.
    let create = !path.starts_with("/dev/");
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .open(path)
}

pub fn size(file: &File) -> io::Result<u64> {
    if !is_device(file)? {
        return Ok(file.metadata()?.len());
    }
    let mut size = [0];
    device(file, BLKGETSIZE64, &mut size)?;
    Ok(size[0])
}

pub fn write(file: &File, offset: u64, length: u64, seed: u64) -> io::Result<()> {
    each_step(file, offset, length, |at, buffer| {
        pattern::fill(buffer, at, seed);
        file.write_all_at(buffer, at)
    })?;
    file.sync_data()
}

/// Data that is zero: written like any other data.
pub fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    each_step(file, offset, length, |at, buffer| {
        file.write_all_at(buffer, at)
    })?;
    file.sync_data()
}

/// Zeros by the disk's own command for it.
pub fn zeroout(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if is_device(file)? {
        device(file, BLKZEROOUT, &mut [offset, length])?;
    } else {
        allocate(file, FALLOC_FL_ZERO_RANGE, offset, length)?;
    }
    file.sync_data()
}

pub fn discard(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if is_device(file)? {
        return device(file, BLKDISCARD, &mut [offset, length]);
    }
    allocate(
        file,
        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        offset,
        length,
    )
}

/// Reads from the disk itself, not from the cache, and compares with what `write` wrote.
pub fn check(file: &File, offset: u64, length: u64, seed: u64) -> io::Result<()> {
    file.sync_data()?;
    if is_device(file)? {
        device(file, BLKFLSBUF, &mut [])?;
    } else {
        fs::write("/proc/sys/vm/drop_caches", "1")?;
    }
    each_step(file, offset, length, |at, buffer| {
        file.read_exact_at(buffer, at)?;
        for (index, bytes) in (at / 8..).zip(buffer.chunks_exact(8)) {
            if bytes != pattern::word(seed, index).to_le_bytes() {
                return Err(io::Error::other(format!("differs at {}", index * 8)));
            }
        }
        Ok(())
    })
}

fn each_step(
    file: &File,
    offset: u64,
    length: u64,
    mut step: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    if !offset.is_multiple_of(8) || !length.is_multiple_of(8) {
        return Err(io::Error::other("offset and length must be multiples of 8"));
    }
    if is_device(file)? && offset + length > size(file)? {
        return Err(io::Error::other("beyond the disk's end"));
    }
    let mut buffer = vec![0; STEP.min(length as usize)];
    let mut at = offset;
    while at < offset + length {
        let part = buffer.len().min((offset + length - at) as usize);
        step(at, &mut buffer[..part])?;
        at += part as u64;
    }
    Ok(())
}

fn is_device(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

fn device(file: &File, request: u64, words: &mut [u64]) -> io::Result<()> {
    // SAFETY: each caller gives as many words as its request reads or writes.
    answer(unsafe { ioctl(file.as_raw_fd(), request, words.as_mut_ptr()) })
}

fn allocate(file: &File, mode: i32, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: no memory is passed.
    answer(unsafe { fallocate64(file.as_raw_fd(), mode, offset as i64, length as i64) })
}

fn answer(code: i32) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
