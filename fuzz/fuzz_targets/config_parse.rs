//! No argument, variable or configuration file makes the parser panic, and what it accepts is valid.
//!
//! The input is cut at line feeds, which arguments and variables do without: a first byte says how many arguments and how many variables
//! follow, one to a line, and the rest is the configuration file.
#![no_main]

use std::ffi::OsString;

use libfuzzer_sys::fuzz_target;
use quorate::cli::{Action, parse};

fuzz_target!(|data: &[u8]| {
    let Some((counts, data)) = data.split_first() else { return };
    let (arg_count, var_count) = (usize::from(counts & 7), usize::from(counts >> 3 & 3));
    let text = String::from_utf8_lossy(data);
    let mut lines = text.splitn(arg_count + var_count + 1, '\n');
    let args: Vec<OsString> = lines.by_ref().take(arg_count).map(OsString::from).collect();
    let env: Vec<(OsString, OsString)> = lines
        .by_ref()
        .take(var_count)
        .map(|line| line.split_once('=').unwrap_or((line, "")))
        .map(|(name, value)| (format!("ETCD_{name}").into(), value.into()))
        .collect();
    let file = lines.next().unwrap_or_default();
    for args in [args.clone(), args.into_iter().chain(["--config-file=f".into()]).collect()] {
        if let Ok(Action::Run(run)) = parse(args, env.clone(), |_| Ok(file.as_bytes().to_vec())) {
            run.config.validate().expect("what the parser accepts is valid");
            // What is derived from a valid configuration is there.
            let _ = (run.config.quota(), run.config.grpc_keepalive(), run.config.effective_data_dir());
            run.config.auto_compaction().expect("validated");
            run.config.initial_members().expect("validated");
        }
    }
});
