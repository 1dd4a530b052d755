#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cyrene_fuzz::run("hub_answer", data));
