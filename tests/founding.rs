//! Founding a cluster: the agreement of `src/embed/founding/agree.rs`, which is the code that production runs, under every interleaving
//! of small cases (`founding/model.rs`) and under many seeds of larger ones (`founding/sim.rs`).
//!
//! ```text
//! cargo test --test founding -- --nocapture                               # shows the counts
//! FOUNDING_SEEDS=10000 cargo test --test founding seeds -- --nocapture    # more seeds
//! FOUNDING_SEED=77 cargo test --test founding one_seed -- --nocapture     # one seed again, with its trace
//! FOUNDING_DEEP=1 cargo test --release --test founding model -- --nocapture --test-threads 1   # the larger cases of the model, too
//! ```

#[path = "founding/model.rs"]
mod model;
#[path = "founding/sim.rs"]
mod sim;
