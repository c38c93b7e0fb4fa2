//! The terminal of whoever runs the program, whatever its standard streams are: for questions that a person has to
//! answer, and for secrets that are typed.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};

use anyhow::{Context, Result};
use hsm_core::secrets::Pin;
use zeroize::Zeroizing;

use crate::exit::usage;

const TERMINAL: &str = "/dev/tty";

/// Somebody who can be asked.
pub(crate) struct Terminal {
    input: BufReader<File>,
    output: File,
}

impl Terminal {
    /// The controlling terminal; a usage error that ends with `remedy` if there is none.
    pub(crate) fn open(remedy: &str) -> Result<Self> {
        let attempt = || {
            let input = OpenOptions::new().read(true).open(TERMINAL)?;
            let output = OpenOptions::new().write(true).open(TERMINAL)?;
            std::io::Result::Ok((input, output))
        };
        let (input, output) = attempt().map_err(|error| {
            usage(format!(
                "there is no terminal to ask on ({TERMINAL}: {error}); {remedy}"
            ))
        })?;
        Ok(Self {
            input: BufReader::new(input),
            output,
        })
    }

    /// Shows a text and waits for a line; without the blanks around it. Empty if there is none.
    pub(crate) fn ask(&mut self, text: &str) -> Result<String> {
        self.output
            .write_all(text.as_bytes())
            .and_then(|()| self.output.flush())
            .context("write to the terminal")?;
        let mut line = String::new();
        self.input
            .read_line(&mut line)
            .context("read from the terminal")?;
        Ok(line.trim().to_owned())
    }
}

/// A secret, typed without being shown. rpassword asks on the terminal itself.
pub(crate) fn secret(question: &str) -> Result<Pin> {
    let typed = rpassword::prompt_password(question)
        .map(Zeroizing::new)
        .context("read from the terminal")?;
    Ok(Pin::new(typed.as_str().to_owned()))
}
