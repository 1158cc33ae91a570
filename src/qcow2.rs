//! The qcow2 format, as far as it is ours: an empty image, and who keeps its data.
//!
//! ```text
//! cluster 0              1               2              3 ...
//! header, name below  |  refcount table  |  refcounts  |  level 1 table: nothing yet
//! ```
//! Images are formatted here and not by QEMU's `blockdev-create`: QEMU 7.2 aborts, and its
//! guest with it, when anybody asks it for its named nodes while it formats one.
//!
//! What is empty is written too: QEMU takes an image with fewer bytes on disk than clusters in use
//! for one with preallocated metadata, and asks the file below about each piece of it.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What an image starts with; its version comes next.
const MAGIC: &[u8; 4] = b"QFI\xfb";

/// The version that is written.
const VERSION: u32 = 3;

/// Bytes of a cluster, as a power of two: QEMU's own choice.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Bytes of an entry of the level 1 table, each of which stands for a cluster of others.
const ENTRY: u64 = 8;

/// Bytes of the disk that an entry of the level 1 table stands for.
const COVERED: u64 = CLUSTER / ENTRY * CLUSTER;

/// Longest level 1 table that QEMU opens.
const LEVEL_1_MAX: u64 = 32 << 20;

/// Bytes of a header of version 3; those before its own length are all that QEMU has needed.
const HEADER: u32 = 104;

/// Where the incompatible features stand in it.
const FEATURES: usize = 72;

/// Refcounts have 16 bits, as a power of two.
const REFCOUNT_ORDER: u32 = 4;

/// The header extension with the format of the image below.
const BELOW_FORMAT: u32 = 0xe279_2aca;

/// Most bytes of the name of the image below.
const BELOW_MAX: usize = 1023;

/// The incompatible feature "external data file".
const DATA_FILE_BIT: u64 = 1 << 2;

/// Makes an empty image of `size` bytes of an empty file, which names the image and the format
/// below it.
///
/// # Errors
/// The file system's; [`io::ErrorKind::InvalidInput`]: the disk is too large for the format, or
/// the name too long.
pub(crate) fn format(file: &File, size: u64, below: Option<(&str, &str)>) -> io::Result<()> {
    let entries = size.div_ceil(COVERED);
    if entries * ENTRY > LEVEL_1_MAX {
        return Err(invalid("the disk is too large for qcow2"));
    }
    let clusters = 3 + (entries * ENTRY).div_ceil(CLUSTER);
    let used: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    let tables = [
        header(size, entries, below)?,
        (2 * CLUSTER).to_be_bytes().to_vec(),
        used,
    ];
    let mut at = 0;
    for mut table in tables {
        table.resize(length(CLUSTER)?, 0);
        file.write_all_at(&table, at)?;
        at += CLUSTER;
    }
    file.write_all_at(&vec![0; length(entries * ENTRY)?], at)?;
    file.set_len(clusters * CLUSTER)
}

fn header(size: u64, entries: u64, below: Option<(&str, &str)>) -> io::Result<Vec<u8>> {
    let (name, format) = below.unwrap_or_default();
    if name.len() > BELOW_MAX {
        return Err(invalid("the name of the image below is too long"));
    }
    let mut extensions = Vec::new();
    if below.is_some() {
        extensions.extend(BELOW_FORMAT.to_be_bytes());
        extensions.extend(short(format.len())?.to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    // Their end: no type, no length.
    extensions.extend([0; 8]);
    let name_at = match below {
        Some(_) => u64::from(HEADER) + u64::from(short(extensions.len())?),
        None => 0,
    };
    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(VERSION.to_be_bytes());
    header.extend(name_at.to_be_bytes());
    header.extend(short(name.len())?.to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend([0; 4]); // no encryption
    header.extend(
        u32::try_from(entries)
            .map_err(io::Error::other)?
            .to_be_bytes(),
    );
    header.extend((3 * CLUSTER).to_be_bytes());
    header.extend(CLUSTER.to_be_bytes());
    header.extend(1_u32.to_be_bytes()); // clusters of the refcount table
    header.extend([0; 4 + 8]); // no snapshots
    header.extend([0; 3 * 8]); // no features
    header.extend(REFCOUNT_ORDER.to_be_bytes());
    header.extend(HEADER.to_be_bytes());
    header.extend(extensions);
    header.extend(name.as_bytes());
    Ok(header)
}

fn short(bytes: usize) -> io::Result<u32> {
    u32::try_from(bytes).map_err(io::Error::other)
}

fn length(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Whether an image keeps its data in another file. Its header names that file, QEMU opens it
/// with the image, whatever it is, and writes there what is written to the image. An image that
/// is no qcow2 has none.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn has_data_file(image: &File) -> io::Result<bool> {
    let mut header = [0; FEATURES + 8];
    match image.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    }
    let features = header.last_chunk().map(|bytes| u64::from_be_bytes(*bytes));
    let version = header[..8]
        .last_chunk()
        .map(|bytes| u32::from_be_bytes(*bytes));
    Ok(header.starts_with(MAGIC)
        && version.is_some_and(|version| version >= 3)
        && features.is_some_and(|features| features & DATA_FILE_BIT != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use serde_json::{Value, json};

    /// What `qemu-img` says of it: the judge is QEMU.
    fn qemu_img(command: &[&str], path: &std::path::Path) -> Value {
        let output = Command::new("qemu-img")
            .args(command)
            .args(["--output", "json", "-f", "qcow2"])
            .arg(path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[test]
    fn qemu_finds_an_empty_image_without_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        for size in [
            0,
            512,
            COVERED,
            COVERED + 512,
            5 << 40,
            LEVEL_1_MAX / ENTRY * COVERED,
        ] {
            let path = folder.path().join(size.to_string());
            let file = File::create_new(&path).unwrap();
            format(&file, size, None).unwrap();
            let checked = qemu_img(&["check"], &path);
            assert_eq!(checked["check-errors"], 0, "{checked}");
            assert_eq!(
                (&checked["leaks"], &checked["corruptions"]),
                (&Value::Null, &Value::Null)
            );
            assert_eq!(checked["image-end-offset"], file.metadata().unwrap().len());
            // As many as QEMU's own has, but for the end of the last one.
            let taken = file.metadata().unwrap().blocks() * 512;
            let own = 3 * CLUSTER + size.div_ceil(COVERED) * ENTRY;
            assert!(taken >= own, "{taken} of {own}");
            let info = qemu_img(&["info"], &path);
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["cluster-size"], CLUSTER);
            assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
            assert!(!has_data_file(&file).is_ok_and(|has| has));
        }
        let file = File::create_new(folder.path().join("large")).unwrap();
        let large = format(&file, LEVEL_1_MAX / ENTRY * COVERED + 1, None).unwrap_err();
        assert_eq!(large.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn it_names_the_image_below() {
        let folder = tempfile::tempdir().unwrap();
        for (number, name) in ["b", "below.raw", "żółw.qcow2", &"x".repeat(BELOW_MAX)]
            .into_iter()
            .enumerate()
        {
            let path = folder.path().join(number.to_string());
            let file = File::create_new(&path).unwrap();
            format(&file, 1 << 30, Some((name, "raw"))).unwrap();
            let info = qemu_img(&["info"], &path);
            let told = json!([info["backing-filename"], info["backing-filename-format"]]);
            assert_eq!(told, json!([name, "raw"]));
        }
        let file = File::create_new(folder.path().join("long")).unwrap();
        let name = "x".repeat(BELOW_MAX + 1);
        let long = format(&file, 1, Some((&name, "raw"))).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidInput);
    }

    fn headed(version: u32, features: u64) -> Vec<u8> {
        let mut header = [&MAGIC[..], &version.to_be_bytes()].concat();
        header.resize(FEATURES, 0);
        header.extend(features.to_be_bytes());
        header
    }

    #[test]
    fn only_the_header_of_a_qcow2_tells_of_a_data_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        for (bytes, has) in [
            (headed(3, 4), true),
            (headed(3, u64::MAX), true),
            (headed(3, 0), false),
            (headed(3, !4), false),
            // What stands there is no field of version 2.
            (headed(2, 4), false),
            ([&[0; 4], &headed(3, 4)[4..]].concat(), false),
            (headed(3, 4)[..79].to_vec(), false),
            (Vec::new(), false),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            let file = File::open(&path).unwrap();
            assert_eq!(has_data_file(&file).unwrap(), has, "{bytes:?}");
        }
    }
}
