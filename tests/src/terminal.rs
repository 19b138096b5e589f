//! A program on a terminal, by `script` of util-linux: what it shows is read as it comes, and it can be answered.

use std::{
    io::{Read as _, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::wait::LONG;

/// A program whose standard streams are a terminal of 120 columns. It ends with this.
#[derive(Debug)]
pub struct Terminal {
    script: Child,
    keys: ChildStdin,
    screen: Arc<Screen>,
}

#[derive(Debug, Default)]
struct Screen {
    shown: Mutex<Shown>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Shown {
    text: String,
    ended: bool,
}

impl Screen {
    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Terminal {
    /// Starts a command without arguments that a shell would have to quote. `None`, and a word of it, where there is no `script`.
    pub fn start(command: &Command) -> Option<Self> {
        let words: Vec<&str> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_str().unwrap())
            .collect();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.,:=+".contains(c);
        assert!(
            words.iter().all(|word| word.chars().all(plain)),
            "{words:?}"
        );
        // Its keys come from a pipe, so `script` knows no size to give to its terminal.
        let line = format!("stty cols 120 rows 50 && exec {}", words.join(" "));
        let mut script = Command::new("script");
        script
            .args(["-qec", &line, "/dev/null"])
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .env_remove("NO_COLOR");
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => script.env(name, value),
                None => script.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            script.current_dir(dir);
        }
        script
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut script = match script.spawn() {
            Ok(script) => script,
            Err(error) => {
                println!("SKIPPED: script (package bsdutils) cannot be started: {error}");
                return None;
            }
        };
        let screen = Arc::new(Screen::default());
        let mut output = script.stdout.take().expect("piped");
        let written = screen.clone();
        thread::spawn(move || {
            let mut piece = [0; 4_096];
            while let Ok(length @ 1..) = output.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..length]);
                written.lock().text.push_str(&text);
                written.more.notify_all();
            }
            written.lock().ended = true;
            written.more.notify_all();
        });
        Some(Self {
            keys: script.stdin.take().expect("piped"),
            script,
            screen,
        })
    }

    /// Waits until `words` were shown.
    #[track_caller]
    pub fn shows(&self, words: &str) {
        let shown = self.wait(|shown| shown.text.contains(words) || shown.ended);
        assert!(
            shown.contains(words),
            "{words:?} is not on the terminal:\n{shown}"
        );
    }

    /// Types a line.
    pub fn types(&mut self, line: &str) {
        self.keys.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Waits for its end; gives its exit code, and all that was shown, with what steers a terminal.
    #[track_caller]
    pub fn end(mut self) -> (i32, String) {
        let shown = self.wait(|shown| shown.ended);
        let status = self.script.wait().unwrap();
        (status.code().unwrap_or(-1), shown)
    }

    #[track_caller]
    fn wait(&self, enough: impl Fn(&Shown) -> bool) -> String {
        let until = Instant::now() + LONG;
        let mut shown = self.screen.lock();
        while !enough(&shown) {
            assert!(
                Instant::now() < until,
                "still on the terminal:\n{}",
                shown.text
            );
            shown = self
                .screen
                .more
                .wait_timeout(shown, Duration::from_secs(1))
                .unwrap()
                .0;
        }
        shown.text.clone()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The terminal goes with it, and the program hears of that.
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}
