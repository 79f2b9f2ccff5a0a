//! Turns the `.proto` files beside this file into Rust, with nothing but Rust: `protox` parses them in place of `protoc`.
//!
//! Two things come out, both into `OUT_DIR` and both taken in by `src/proto.rs`: one `.rs` file for each package, with
//! messages, servers and clients; and `quorate_descriptor.bin`, the public packages as an encoded `FileDescriptorSet` for
//! server reflection. The generated code differs from the usual in four ways:
//! - every `bytes` field is a `bytes::Bytes`, so that decoding a request copies neither keys nor values;
//! - `mvccpb.KeyValue` is not generated but stands for `crate::proto::EncodedKv`, which holds the bytes as stored;
//! - maps are `BTreeMap`s, so that equal messages have equal encodings;
//! - fields such as `peerURLs` become `peer_urls`; left alone they would come out as `peer_ur_ls`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use protox::Compiler;

/// What clients may see; these are also the files that reflection serves.
const PUBLIC: [&str; 6] = [
    "mvccpb/kv.proto",
    "authpb/auth.proto",
    "etcdserverpb/rpc.proto",
    "v3lockpb/v3lock.proto",
    "v3electionpb/v3election.proto",
    "grpc/health/v1/health.proto",
];

/// What stays between members and on disk.
const PRIVATE: [&str; 3] = ["quorate/internal.proto", "quorate/peer.proto", "quorate/founding.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for file in PUBLIC.iter().chain(&PRIVATE) {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }

    // Without comments: they would make up most of the set, and reflection is about names and types.
    let mut public = Compiler::new([&root])?;
    public.include_imports(true).include_source_info(false).open_files(PUBLIC)?;
    fs::write(out.join("quorate_descriptor.bin"), public.encode_file_descriptor_set())?;

    // With comments: they become the documentation of the generated code.
    let mut all = Compiler::new([&root])?;
    all.include_imports(true).include_source_info(true).open_files(PUBLIC)?.open_files(PRIVATE)?;
    let mut files = all.file_descriptor_set();
    for field in files.file.iter_mut().flat_map(|file| &mut file.message_type).flat_map(|message| &mut message.field) {
        field.name = field.name.take().map(|name| name.replace("URLs", "Urls"));
    }

    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        .bytes(".")
        .btree_map(".")
        .extern_path(".mvccpb.KeyValue", "crate::proto::EncodedKv")
        .compile_fds(files)?;
    Ok(())
}
