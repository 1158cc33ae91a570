//! The plugin: wiring only.
fn main() {}
