//! The images that a disk is made of, and their dirty bitmaps.

use crate::checkpoint::Mark;
use crate::qemu::query::{BlockNode, DirtyBitmap, plain_file};

/// Drivers of nodes that stand for a whole image.
pub(super) const FORMATS: &[&str] = &[
    "raw",
    "qcow2",
    "qcow",
    "qed",
    "vmdk",
    "vdi",
    "vhdx",
    "vpc",
    "luks",
    "parallels",
    "bochs",
];

/// A dirty bitmap of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Changes are recorded.
    pub recording: bool,
    /// A job or an export uses it.
    pub busy: bool,
    /// The image stores it.
    pub persistent: bool,
    /// It was not stored in order, and cannot be used.
    pub inconsistent: bool,
}

/// An image of a disk: its own, or one that it is backed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its node.
    pub node: String,
    /// Of its file.
    pub image: Mark,
    /// Its named dirty bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// Bytes that its file takes, where that is known.
    pub allocated: Option<u64>,
}

/// The images that a disk is made of, its own first. QEMU tells what is below a
/// node by the file's name only.
#[must_use]
pub fn layers(root: &BlockNode, nodes: &[BlockNode]) -> Vec<Layer> {
    let mut layers = vec![layer(root)];
    let mut node = root;
    // No chain is longer than there are nodes.
    while let Some(below) = node.backing_file.as_deref().map(plain_file)
        && layers.len() <= nodes.len()
    {
        // Another disk may have a node of its own for the same file: its bitmaps are
        // the same, as both were loaded from there.
        let mut found = nodes
            .iter()
            .filter(|node| plain_file(&node.file) == below && FORMATS.contains(&node.drv.as_str()));
        let Some(first) = found.next() else { break };
        node = std::iter::once(first)
            .chain(found)
            .find(|node| !node.dirty_bitmaps.is_empty())
            .unwrap_or(first);
        layers.push(layer(node));
    }
    layers
}

fn layer(node: &BlockNode) -> Layer {
    let named = |bitmap: &DirtyBitmap| {
        Some(Bitmap {
            name: bitmap.name.clone().filter(|name| !name.is_empty())?,
            count: bitmap.count,
            granularity: bitmap.granularity,
            recording: bitmap.recording,
            busy: bitmap.busy,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
        })
    };
    Layer {
        node: node.node_name.clone(),
        image: Mark::of(&[&plain_file(&node.file)]),
        bitmaps: node.dirty_bitmaps.iter().filter_map(named).collect(),
        allocated: node.image.actual_size,
    }
}
