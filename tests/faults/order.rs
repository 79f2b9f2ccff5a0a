//! The order of the requests as a member's own log has it, printed by `quorate log --json`.
//!
//! The requests are carried out here once more, by a model of a few lines; that gives each revision what it must have changed. What a watch
//! told of the same revisions, which the judges take for the truth, has to be the same: so nothing rests on what a member says of
//! its history alone.
//!
//! ```text
//! {"index":12,"commands":[{"put":{"key":"a","value":"7","lease":0}}]}  ->  revision 9: a=7
//! {"index":13,"commands":[{"txn":{"if":[{"target":"mod","key":"a","with":8}], ...}]}  ->  nothing: the guard does not hold
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::checkers::history::Change;

/// Carries a log out, from the cluster's foundation on, a piece at a time.
#[derive(Debug)]
pub struct Order {
    /// The next entry.
    next: u64,
    revision: i64,
    /// Key to the revision that wrote it, and its lease.
    items: BTreeMap<String, (i64, i64)>,
    leases: BTreeMap<i64, BTreeSet<String>>,
    /// What revisions changed that nobody has asked for yet.
    revisions: BTreeMap<i64, Vec<Change>>,
}

impl Default for Order {
    fn default() -> Self {
        Order { next: 1, revision: 1, items: BTreeMap::new(), leases: BTreeMap::new(), revisions: BTreeMap::new() }
    }
}

impl Order {
    /// Reads a member's log up to a revision. None if it does not go back as far as this has come.
    ///
    /// # Errors
    /// What is wrong with the log.
    pub fn read(&mut self, program: &Path, data: &Path, upto: i64) -> Result<Option<()>, String> {
        let mut command = Command::new(program);
        let output = command.arg("log").arg("--json").arg(format!("--from={}", self.next)).arg("--data-dir").arg(data).output();
        let output = output.map_err(|err| err.to_string())?;
        if !output.status.success() {
            return Err(format!("quorate log: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if self.revision >= upto {
                break;
            }
            let entry: Value = serde_json::from_str(line).map_err(|err| format!("{err}: {line}"))?;
            let index = entry["index"].as_u64().ok_or("an entry without index")?;
            if index != self.next {
                return Ok(None);
            }
            self.next = index + 1;
            for command in entry["commands"].as_array().into_iter().flatten() {
                self.carry_out(command, &entry["term"]).map_err(|what| format!("{what} in {line}"))?;
            }
        }
        if self.revision < upto { Ok(None) } else { Ok(Some(())) }
    }

    /// What revisions up to this one changed, each in the order of keys.
    pub fn take(&mut self, upto: i64) -> BTreeMap<i64, Vec<Change>> {
        let later = self.revisions.split_off(&(upto + 1));
        std::mem::replace(&mut self.revisions, later)
    }

    fn carry_out(&mut self, command: &Value, term: &Value) -> Result<(), String> {
        let (name, of) = command.as_object().and_then(|command| command.iter().next()).ok_or("no command")?;
        match name.as_str() {
            "put" | "delete" => {
                let mut changes = Vec::new();
                let may = name != "put" || self.has_lease(of);
                if may {
                    self.change(command, &mut changes)?;
                }
                self.commit(changes);
            }
            "txn" => {
                let holds = of["if"].as_array().into_iter().flatten().all(|guard| {
                    let modified = self.items.get(text(&guard["key"])).map_or(0, |item| item.0);
                    guard["with"].as_i64() == Some(modified)
                });
                let ops = of[if holds { "then" } else { "else" }].as_array().into_iter().flatten();
                // A lease that is gone refuses the whole.
                if ops.clone().all(|op| self.has_lease(&op["put"])) {
                    let mut changes = Vec::new();
                    for op in ops {
                        self.change(op, &mut changes)?;
                    }
                    self.commit(changes);
                }
            }
            "lease_grant" => {
                self.leases.entry(number(&of["id"])).or_default();
            }
            // It counts only in the term in which it was seen.
            "lease_expiry" if of["term"] != *term => {}
            "lease_revoke" | "lease_expiry" => {
                let keys = self.leases.remove(&number(&of["id"])).unwrap_or_default();
                let changes: Vec<Change> = keys.into_iter().map(|key| Change { key, value: None }).collect();
                for change in &changes {
                    self.items.remove(&change.key);
                }
                self.commit(changes);
            }
            "compact" | "alarm" | "lease_checkpoint" | "lease_checkpoints" | "cluster_version" | "member_attributes" => {}
            other => return Err(format!("{other}, of which this test knows nothing")),
        }
        Ok(())
    }

    fn has_lease(&self, put: &Value) -> bool {
        let lease = number(&put["lease"]);
        lease == 0 || self.leases.contains_key(&lease)
    }

    /// Makes the change of one operation, at the revision to come.
    fn change(&mut self, op: &Value, changes: &mut Vec<Change>) -> Result<(), String> {
        let revision = self.revision + 1;
        if let Some(put) = op.get("put") {
            let (key, lease) = (text(&put["key"]).to_owned(), number(&put["lease"]));
            let value = text(&put["value"]).parse().map_err(|_| format!("{put} puts what is no number"))?;
            if let Some((_, old)) = self.items.insert(key.clone(), (revision, lease)) {
                self.leases.get_mut(&old).map(|keys| keys.remove(&key));
            }
            self.leases.get_mut(&lease).map(|keys| keys.insert(key.clone()));
            changes.push(Change { key, value: Some(value) });
        } else if let Some(delete) = op.get("delete") {
            let key = text(&delete["key"]);
            if let Some((_, lease)) = self.items.remove(key) {
                self.leases.get_mut(&lease).map(|keys| keys.remove(key));
                changes.push(Change { key: key.to_owned(), value: None });
            }
        }
        Ok(())
    }

    fn commit(&mut self, mut changes: Vec<Change>) {
        if !changes.is_empty() {
            self.revision += 1;
            changes.sort_unstable();
            self.revisions.insert(self.revision, changes);
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_default()
}
