//! Bars side by side, as SVG.

use std::fmt::Write as _;

/// A bar.
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) value: f64,
}

const WIDTH: usize = 720;
/// Where bars begin, and how long the longest is.
const LEFT: usize = 150;
const LONGEST: f64 = 480.0;
/// Of one bar with the space below it.
const LINE: usize = 22;
/// Of a heading.
const HEADING: usize = 34;

/// Groups of bars, each with a heading and a scale of its own. The first bar of each stands out.
pub(super) fn bars(groups: &[(String, Vec<Bar>)]) -> String {
    let height: usize = groups.iter().map(|(_, bars)| HEADING + LINE * bars.len()).sum();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{}\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#777\">\n",
        height + LINE
    );
    let mut y = 0;
    for (heading, bars) in groups {
        y += HEADING;
        let _ =
            writeln!(svg, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{heading}</text>", y - 8);
        let greatest = bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
        for (n, Bar { name, value }) in bars.iter().enumerate() {
            let (length, text) = (LONGEST * value / greatest, y + 13);
            let colour = if n == 0 { "#2a7ae2" } else { "#b5b5b5" };
            let end = LEFT as f64 + length + 6.0;
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{name}</text>\
                 <rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"16\" fill=\"{colour}\"/>\
                 <text x=\"{end:.1}\" y=\"{text}\">{value:.2}</text>",
                LEFT - 8
            );
            y += LINE;
        }
    }
    svg + "</svg>\n"
}
