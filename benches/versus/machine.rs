//! What the figures were taken on.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::wire::Result;

/// Facts about the machine, each with its name. Those that cannot be found out are missing.
pub fn facts(dir: &Path) -> Vec<(&'static str, String)> {
    let mut facts = vec![("cores", std::thread::available_parallelism().map_or(0, usize::from).to_string())];
    let mut add = |name, fact: Option<String>| facts.extend(fact.map(|fact| (name, fact)));
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?.split_once(':')?.1;
        Some(line.trim().to_string())
    };
    add("processor", field("/proc/cpuinfo", "model name"));
    let kib = field("/proc/meminfo", "MemTotal").and_then(|text| text.strip_suffix(" kB")?.parse::<f64>().ok());
    add("memory", kib.map(|kib| format!("{:.1} GiB", kib / f64::from(1 << 20))));
    add("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| format!("Linux {}", text.trim())));
    add("disk", mount_of(dir).map(|mount| mount.to_string()));
    add("load before", fs::read_to_string("/proc/loadavg").ok().and_then(|text| Some(text.split(' ').next()?.to_string())));
    facts
}

/// The file system that a directory is on.
pub struct Mount {
    pub kind: String,
    device: String,
    /// Whether the device has a volatile cache that fdatasync must empty: "write back" or "write through".
    cache: Option<String>,
}

impl std::fmt::Display for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, device, cache } = self;
        write!(f, "{kind} on {device}")?;
        cache.as_ref().map_or(Ok(()), |cache| write!(f, ", {cache}"))
    }
}

pub fn mount_of(dir: &Path) -> Option<Mount> {
    let dir = dir.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    // A later mount at the same place hides an earlier one.
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    let (device, _, kind) = fields.filter(|(_, at, _)| dir.starts_with(at)).max_by_key(|(_, at, _)| at.len())?;
    let name = device.rsplit('/').next()?.to_string();
    let cache = |block: &str| fs::read_to_string(format!("/sys/class/block/{block}/queue/write_cache")).ok();
    // A partition has its queue in the whole device.
    let cache = cache(&name).or_else(|| cache(name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('p')));
    Some(Mount { kind: kind.into(), device: name, cache: cache.map(|text| text.trim().into()) })
}

/// Bytes that the device which holds a directory has written since the machine started, after everything that waited was written too. It
/// counts whoever writes: only on a machine that does nothing else it is what the servers wrote. `None` where the device is unknown.
pub fn device_written(dir: &Path) -> Option<f64> {
    let device = mount_of(dir)?.device;
    rustix::fs::sync();
    let stats = fs::read_to_string("/proc/diskstats").ok()?;
    // Number, number, name, then reads: completed, merged, sectors, time; then the same of writes. A sector has 512 bytes here, always.
    let fields = stats.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| fields.get(2) == Some(&&*device))?;
    Some(fields.get(9)?.parse::<f64>().ok()? * 512.0)
}

/// What a program says about its version: the first line, unless a later one is about the program by its own name, for the first of a
/// program that stands in for etcd is what clients want to hear.
pub fn version(binary: &Path) -> Result<String> {
    let output = Command::new(binary).arg("--version").output().map_err(|error| format!("{}: {error}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let own = binary.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let line = text.lines().find(|line| !own.is_empty() && line.starts_with(own)).or_else(|| text.lines().next());
    Ok(line.unwrap_or_default().trim().to_string())
}

/// The command line, paths shortened to their last part: where things lie here is nobody's business elsewhere.
pub fn command_line(args: &[String]) -> String {
    let shortened = args.iter().filter(|arg| *arg != "--bench").map(|arg| match arg.split_once('=') {
        Some((name, value)) => format!("{name}={}", last_part(value)),
        None => last_part(arg).to_string(),
    });
    format!("cargo bench --bench versus -- {}", shortened.collect::<Vec<_>>().join(" "))
}

fn last_part(text: &str) -> &str {
    if text.contains("://") { text } else { text.rsplit('/').next().unwrap_or(text) }
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    #[test]
    fn paths_are_shortened() {
        let args = ["--etcd", "/opt/etcd/etcd", "--out=/tmp/x", "--bench", "--endpoints-a", "http://127.0.0.1:2379"].map(String::from);
        assert_eq!(command_line(&args), "cargo bench --bench versus -- --etcd etcd --out=x --endpoints-a http://127.0.0.1:2379");
    }

    #[test]
    fn every_directory_is_mounted_somewhere() {
        assert!(!mount_of(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap().kind.is_empty());
        assert_eq!(mount_of(Path::new("/proc")).unwrap().kind, "proc");
        assert!(facts(Path::new("/")).len() >= 3);
    }
}
