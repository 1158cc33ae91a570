#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| qemu_fleece_fuzz::chain::run(input));
