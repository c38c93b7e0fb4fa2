//! PINs that are typed: asked for once, on the terminal of the process, whatever its standard streams are. Nothing
//! that is typed is shown, and nothing of it is in an error. What rpassword holds in the end is wiped; a buffer that
//! it has outgrown meanwhile is only freed, in a process that cannot be dumped.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use hsm_core::secrets::Pin;
use rpassword::{ConfigBuilder, prompt_password_with_config};
use zeroize::Zeroizing;

use super::{MAX_SECRET, SecretError};
use crate::config::{Hsm, PinSource};

/// The controlling terminal of whoever opens it.
const TERMINAL: &str = "/dev/tty";

/// Asks for the PIN of every slot whose configuration says so. Blocks until all are typed.
///
/// # Errors
/// Without a terminal, and when nothing is typed. Whether a PIN is right only its token can say.
pub fn ask_pins(hsm: &Hsm) -> Result<(), SecretError> {
    let terminal = Terminal {
        input: TERMINAL.into(),
        output: TERMINAL.into(),
    };
    ask_on(hsm, &terminal)
}

/// Where PINs are typed, and where the question appears: one file but for tests.
struct Terminal {
    input: PathBuf,
    output: PathBuf,
}

fn ask_on(hsm: &Hsm, terminal: &Terminal) -> Result<(), SecretError> {
    for slot in &hsm.slots {
        let PinSource::Prompt { key, typed } = &slot.pin else {
            continue;
        };
        if typed.get().is_some() {
            continue;
        }
        let question = format!("PIN of slot {}, token {}: ", slot.name, slot.label);
        // Only this thread sets it.
        let _ = typed.set(ask(key, &question, terminal)?);
    }
    Ok(())
}

fn ask(key: &str, question: &str, terminal: &Terminal) -> Result<Pin, SecretError> {
    let wrong = |problem: String| SecretError::NotTyped {
        key: key.to_owned(),
        problem,
    };
    can_open(key, &terminal.input)?;
    let config = ConfigBuilder::new()
        .input_file_path(terminal.input.to_string_lossy())
        .output_file_path(terminal.output.to_string_lossy())
        .password_feedback_hide()
        .build();
    let typed = prompt_password_with_config(question, config)
        .map(Zeroizing::new)
        .map_err(|error| wrong(format!("the PIN could not be read: {error}")))?;
    if typed.is_empty() {
        return Err(wrong("nothing was typed".to_owned()));
    }
    if typed.len() > MAX_SECRET {
        return Err(wrong(format!(
            "what was typed is longer than {MAX_SECRET} bytes, so it is not the PIN"
        )));
    }
    Ok(Pin::new(typed.as_str().to_owned()))
}

/// Opening it is what fails where a process has no terminal: the file is always there.
fn can_open(key: &str, terminal: &Path) -> Result<(), SecretError> {
    let opened = OpenOptions::new().read(true).write(true).open(terminal);
    opened.map(drop).map_err(|reason| SecretError::NoTerminal {
        key: key.to_owned(),
        terminal: terminal.to_owned(),
        reason,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use raft_store::names::SlotName;

    use super::*;
    use crate::config::Slot;
    use crate::secrets::{check_pin, read_pin};

    fn slot(name: &str) -> Slot {
        Slot {
            name: SlotName::new(name).unwrap(),
            label: format!("slot-{name}"),
            pin: PinSource::Prompt {
                key: format!("hsm.slots.{name}.pin_prompt"),
                typed: Arc::new(OnceLock::new()),
            },
            contexts: Vec::new(),
            insecure_pin: false,
            threads: 1,
            queue: 16,
            pkcs11_lib: PathBuf::from("/nonexistent/libhsm.so"),
        }
    }

    fn hsm(slots: Vec<Slot>) -> Hsm {
        Hsm::of(slots, [])
    }

    /// Files in place of a terminal: what is typed, and what is shown.
    fn typing(content: &str) -> (tempfile::TempDir, Terminal) {
        let dir = tempfile::tempdir().unwrap();
        let terminal = Terminal {
            input: dir.path().join("in"),
            output: dir.path().join("out"),
        };
        std::fs::write(&terminal.input, content).unwrap();
        std::fs::write(&terminal.output, "").unwrap();
        (dir, terminal)
    }

    #[test]
    fn a_typed_pin_stays_for_every_later_attempt_and_is_asked_for_once() {
        let (_dir, terminal) = typing(" 12 34 \n");
        let hsm = hsm(vec![slot("a")]);
        assert!(read_pin(&hsm.slots[0].pin).is_err());
        ask_on(&hsm, &terminal).unwrap();
        for _ in 0..2 {
            assert_eq!(read_pin(&hsm.slots[0].pin).unwrap().expose(), " 12 34 ");
        }
        let shown = std::fs::read_to_string(&terminal.output).unwrap();
        assert_eq!(shown, "PIN of slot a, token slot-a: ");
        std::fs::remove_file(&terminal.input).unwrap();
        ask_on(&hsm, &terminal).unwrap();
    }

    #[test]
    fn without_a_terminal_key_value_and_remedy_are_named() {
        let terminal = Terminal {
            input: "/nonexistent/tty".into(),
            output: "/nonexistent/tty".into(),
        };
        let hsm = hsm(vec![slot("a")]);
        let error = ask_on(&hsm, &terminal).unwrap_err().to_string();
        assert!(
            error.starts_with("hsm.slots.a.pin_prompt: true: there is no terminal"),
            "{error}"
        );
        assert!(
            error.contains("/nonexistent/tty") && error.contains("pin_file or pin_credential"),
            "{error}"
        );
        // Looking at the source asks nobody.
        assert!(check_pin(&hsm.slots[0].pin).is_ok());
    }

    #[test]
    fn what_cannot_be_a_pin_is_refused_without_repeating_it() {
        for (content, problem) in [
            ("\n".to_owned(), "nothing was typed"),
            (String::new(), "nothing was typed"),
            ("x".repeat(5000), "longer than 4096"),
        ] {
            let (_dir, terminal) = typing(&content);
            let error = ask_on(&hsm(vec![slot("a")]), &terminal).unwrap_err().to_string();
            assert!(
                error.starts_with("hsm.slots.a.pin_prompt: true: ") && error.contains(problem),
                "{error}"
            );
            assert!(!error.contains("xxx"), "{error}");
        }
    }

    #[test]
    fn a_slot_with_another_source_is_not_asked_for() {
        let mut other = slot("b");
        other.pin = PinSource::File {
            key: "k".to_owned(),
            path: PathBuf::from("/nonexistent/pin"),
        };
        let terminal = Terminal {
            input: "/nonexistent/tty".into(),
            output: "/nonexistent/tty".into(),
        };
        ask_on(&hsm(vec![other]), &terminal).unwrap();
    }
}
