#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cyrene_fuzz::run("row_forms", data));
