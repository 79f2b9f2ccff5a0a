//! Disks that a test can take away: a file system of its own on a loop device, whose power can be cut, which can be made to stand still or
//! to be full, and one in memory, which is soon full. Both need root; where they cannot be had the reason is returned.
//!
//! The power cut is ext4's own: the ioctl GOINGDOWN makes it drop whatever has not reached the disk, without writing its journal,
//! as if the power had failed. Mounting it again replays the journal, as after a real one.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program, and returns what it printed, or what it complained of.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|err| format!("{program}: {err}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program} {}: {} {}", args.join(" "), output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

/// A directory with a file system mounted on it, for as long as this lives.
pub struct Mount {
    pub path: PathBuf,
    mounted: bool,
}

impl Mount {
    fn new(path: &Path) -> Result<Mount, String> {
        std::fs::create_dir_all(path).map_err(|err| format!("{}: {err}", path.display()))?;
        Ok(Mount { path: path.to_owned(), mounted: false })
    }

    fn mount(&mut self, args: &[&str]) -> Result<(), String> {
        let path = self.path.to_string_lossy().into_owned();
        run("mount", &[args, &[&path]].concat())?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        run("umount", &[&self.path.to_string_lossy()])?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: whoever still holds a file in it is killed soon.
        if self.mounted
            && let Err(err) = run("umount", &["-l", &self.path.to_string_lossy()])
        {
            eprintln!("{err}");
        }
    }
}

/// A file system in memory.
pub fn small_disk(path: &Path, bytes: u64) -> Result<Mount, String> {
    let mut mount = Mount::new(path)?;
    mount.mount(&["-t", "tmpfs", "-o", &format!("size={bytes},mode=700"), "tmpfs"])?;
    Ok(mount)
}

/// An ext4 on a loop device, which is freed with the last mount.
pub struct PowerDisk {
    pub mount: Mount,
    image: PathBuf,
}

impl PowerDisk {
    /// A fresh one, mounted. The image takes only as much of the real disk as is written.
    pub fn new(home: &Path, bytes: u64) -> Result<PowerDisk, String> {
        let image = home.join("image");
        let file = std::fs::File::create(&image).and_then(|file| file.set_len(bytes));
        file.map_err(|err| format!("{}: {err}", image.display()))?;
        run("mkfs.ext4", &["-q", "-F", &image.to_string_lossy()])?;
        let mut disk = PowerDisk { mount: Mount::new(&home.join("disk"))?, image };
        disk.power_on()?;
        Ok(disk)
    }

    /// Mounts it, which brings the file system in order as after a power cut.
    pub fn power_on(&mut self) -> Result<(), String> {
        let image = self.image.to_string_lossy().into_owned();
        self.mount.mount(&["-t", "ext4", "-o", "loop", &image])
    }

    /// Whatever has not reached the disk by now never will.
    pub fn cut_power(&self) -> Result<(), String> {
        // The ioctl has no safe binding in Rust; perl is on every Debian. 0x8004587d with 2: without writing the journal.
        const SHUTDOWN: &str = r#"open(my $dir, "<", $ARGV[0]) or die "open: $!\n"; my $how = pack("L", 2); ioctl($dir, 0x8004587d, $how) or die "ioctl: $!\n""#;
        run("perl", &["-e", SHUTDOWN, &self.mount.path.to_string_lossy()]).map(|_| ())
    }

    /// Lets nothing be written any more, and no sync end, until what is returned is dropped. Who tries meanwhile cannot even be killed.
    pub fn stand_still(&self) -> Result<StandStill, String> {
        let path = self.mount.path.to_string_lossy().into_owned();
        run("fsfreeze", &["--freeze", &path])?;
        Ok(StandStill(path))
    }

    /// Sets all space aside that is left, in a file that costs nothing.
    pub fn fill(&self, ballast: &Path) -> Result<(), String> {
        let complain = |err: std::io::Error| format!("{}: {err}", ballast.display());
        let file = std::fs::File::create(ballast).map_err(complain)?;
        let (mut end, mut step) = (0, 1 << 30);
        while step >= 4096 {
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), end, step) {
                Ok(()) => end += step,
                Err(_) => step /= 2,
            }
        }
        Ok(())
    }

    /// Unmounts it. Nobody may hold a file in it any more.
    pub fn power_off(&mut self) -> Result<(), String> {
        self.mount.unmount()
    }
}

/// A disk that stands still.
pub struct StandStill(String);

impl Drop for StandStill {
    fn drop(&mut self) {
        if let Err(err) = run("fsfreeze", &["--unfreeze", &self.0]) {
            eprintln!("{err}");
        }
    }
}
