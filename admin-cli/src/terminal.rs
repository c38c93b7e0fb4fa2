//! The terminal of whoever runs the program, whatever its standard streams are: for questions that a person has to
//! answer, and for secrets that are typed. With --no-input nobody is asked anything.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use hsm_core::secrets::Pin;
use zeroize::Zeroizing;

use crate::exit::usage;
use crate::output::note;

const TERMINAL: &str = "/dev/tty";

/// Whether questions are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Questions {
    /// On the terminal, if there is one.
    Asked,
    /// Never: --no-input. A question is an error, which says what answers it.
    Refused,
}

/// Somebody who can be asked.
pub(crate) struct Terminal {
    input: BufReader<File>,
    output: File,
}

impl Questions {
    /// What --no-input says.
    pub(crate) fn unless(no_input: bool) -> Self {
        if no_input { Self::Refused } else { Self::Asked }
    }
}

impl Terminal {
    /// The controlling terminal; a usage error that ends with `remedy`, which names the option that answers, if there
    /// is none or nothing may be asked.
    pub(crate) fn open(questions: Questions, remedy: &str) -> Result<Self> {
        if questions == Questions::Refused {
            return Err(usage(format!("nothing is asked (--no-input); {remedy}")));
        }
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

/// Something that is gone afterwards: its name has to be typed, which no habit of the hand does.
pub(crate) struct Destruction<'a> {
    /// What will be lost, as a sentence.
    pub(crate) warning: &'a str,
    /// What has to be typed.
    pub(crate) name: &'a str,
    /// The option that answers in its place.
    pub(crate) option: &'a str,
    /// What that option said.
    pub(crate) answered: Option<&'a str>,
}

impl Destruction<'_> {
    /// For a dry run: whether the question has its answer, or may be asked.
    pub(crate) fn could_be_confirmed(&self, questions: Questions) -> Result<()> {
        match self.answer()? {
            None if questions == Questions::Refused => Terminal::open(questions, &self.remedy()).map(drop),
            _ => Ok(()),
        }
    }

    /// Goes on only if the name was typed, here or in the option's place.
    pub(crate) fn confirm(&self, questions: Questions) -> Result<()> {
        if self.answer()?.is_some() {
            return Ok(());
        }
        let name = self.name;
        let mut terminal = Terminal::open(questions, &self.remedy())?;
        let typed = terminal.ask(&format!("{}\nType {name} to go on: ", self.warning))?;
        if typed != name {
            bail!("not confirmed: nothing was changed");
        }
        Ok(())
    }

    /// Whether the option has answered; a usage error if it has said something else.
    fn answer(&self) -> Result<Option<()>> {
        match self.answered {
            Some(answered) if answered != self.name => {
                let (name, option) = (self.name, self.option);
                Err(usage(format!("{option} is not {name:?}: {}", self.warning)))
            }
            answered => Ok(answered.map(drop)),
        }
    }

    fn remedy(&self) -> String {
        format!(
            "{} If that is meant, say {} {}",
            self.warning, self.option, self.name
        )
    }
}

/// Tells a person that standard input is read, if it is a terminal; a usage error if nothing may be asked there.
/// `option` names a file in its place.
pub(crate) fn announce_stdin(questions: Questions, what: &str, option: &str) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Ok(());
    }
    if questions == Questions::Refused {
        return Err(usage(format!(
            "nothing is asked (--no-input), and standard input is a terminal; name a file with {option}, or pipe \
             {what} in"
        )));
    }
    note(&format!("type {what}, then end it with Ctrl-D"));
    Ok(())
}

/// A secret, typed without being shown. rpassword asks on the terminal itself.
pub(crate) fn secret(question: &str) -> Result<Pin> {
    let typed = rpassword::prompt_password(question)
        .map(Zeroizing::new)
        .context("read from the terminal")?;
    Ok(Pin::new(typed.as_str().to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn erasing(answered: Option<&str>) -> Destruction<'_> {
        Destruction {
            warning: "Every key in the token slot-a will be destroyed.",
            name: "slot-a",
            option: "--confirm-label",
            answered,
        }
    }

    #[test]
    fn a_name_that_was_given_is_compared_and_not_asked_for() {
        for questions in [Questions::Asked, Questions::Refused] {
            erasing(Some("slot-a")).confirm(questions).unwrap();
            for wrong in ["slot-b", "", "yes", "SLOT-A"] {
                let error = erasing(Some(wrong)).confirm(questions).unwrap_err();
                assert_eq!(Exit::of(&error), Exit::Usage, "{wrong}");
                let text = error.to_string();
                assert!(
                    text.contains("--confirm-label") && text.contains("destroyed"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn without_input_a_question_is_an_error_that_names_its_option() {
        let error = erasing(None).confirm(Questions::Refused).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        let text = error.to_string();
        assert!(
            text.contains("--no-input") && text.contains("--confirm-label slot-a"),
            "{text}"
        );
        let error = Terminal::open(Questions::Refused, "say --yes")
            .map(drop)
            .unwrap_err();
        assert!(error.to_string().contains("say --yes"), "{error}");
    }
}
