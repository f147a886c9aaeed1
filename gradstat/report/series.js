// Loss, norm and learning rate over the map, on its axis of steps, with marks where findings begin.

const SERIES_HEIGHT = 58;
const MARKS_HEIGHT = 14;

// The column of records that a step belongs to.
function columnOf(step) {
  let t = 0;
  while (t + 1 < T && meta.steps[t + 1][0] <= step) t++;
  return t;
}

function seriesOf(i) {
  const [level, low, high] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => part(array, i));
  const known = [...low, ...high].filter(Number.isFinite);
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const isLog = least > 0 && most > 30 * least;
  const scale = (values) => (isLog ? values.map(Math.log10) : values);
  return { level: scale(level), low: scale(low), high: scale(high), isLog, bad: part(arrays.seriesNonfinite, i) };
}

function buildSeries(select, leftOf) {
  const series = meta.series.map((_, i) => seriesOf(i));
  const marks = meta.findings
    .filter((finding) => finding.severity !== "note")
    .map((finding) => ({ finding, t: columnOf(finding.steps[0]) }));
  const bottom = series.length * SERIES_HEIGHT;
  const drawing = addCanvas(byId("map-series"), bottom + MARKS_HEIGHT, (context, width) => {
    const left = leftOf();
    series.forEach(({ level, low, high, isLog, bad }, i) => {
      const ends = spread([low, high], 0);
      if (ends[0] === ends[1]) ends[1] = ends[0] + (Math.abs(ends[0]) || 1);
      const box = { left, top: i * SERIES_HEIGHT + 6, width: width - left, height: SERIES_HEIGHT - 12 };
      type(context, 12, "right", "middle");
      context.fillText(fitted(context, meta.series[i], left - 12), left - 8, box.top + box.height / 2);
      context.strokeStyle = css("--line");
      line(context, left, box.top + box.height, width, box.top + box.height);
      curve(context, box, ends, level, low, high, bad);
      // In the margin, above and below the name, where no curve runs.
      type(context, 10, "right", "top");
      const text = (value) => short(Number((isLog ? 10 ** value : value).toPrecision(3)));
      context.fillText(text(ends[1]), left - 8, box.top - 3);
      context.textBaseline = "bottom";
      context.fillText(text(ends[0]), left - 8, box.top + box.height + 1);
    });
    for (const { finding, t } of marks) {
      const x = left + ((t + 0.5) / T) * (width - left);
      context.fillStyle = css(finding.severity === "severe" ? "--severe" : "--warning");
      context.beginPath();
      context.moveTo(x, bottom);
      context.lineTo(x - 5, bottom + 10);
      context.lineTo(x + 5, bottom + 10);
      context.fill();
    }
  }, `By step: ${meta.series.join(", ")}, and where findings begin`);
  const at = (x) => {
    const left = leftOf();
    const width = drawing.canvas.clientWidth - left;
    const found = (each) => Math.abs(left + ((each.t + 0.5) / T) * width - x);
    const near = marks.filter((each) => found(each) <= 7).sort((a, b) => found(a) - found(b));
    const t = Math.floor(((x - left) / width) * T);
    return { near, t: t >= 0 && t < T ? t : null };
  };
  onHover(drawing.canvas, (event, x, y) => {
    const { near, t } = at(x);
    drawing.canvas.style.cursor = near.length && y >= bottom - 4 ? "pointer" : "";
    if (near.length && y >= bottom - 4) showTip(event, near[0].finding.kind, near.map((each) => each.finding.sentence));
    else if (t !== null && series.length) showTip(event, stepsOf(t), meta.series.map((name, i) => `${isolated(name)}: ${seriesText(i, t)}`));
    else hideTip();
  }, () => {});
  drawing.canvas.addEventListener("click", (event) => {
    const box = drawing.canvas.getBoundingClientRect();
    const { near } = at(event.clientX - box.left);
    if (!near.length) return;
    select(near[0].finding.layer, { from: "map", t: near[0].t });
  });
}

function seriesText(i, t) {
  const [mean, least, most] = [arrays.seriesMean, arrays.seriesLeast, arrays.seriesMost].map((array) => array[i * T + t]);
  const broken = arrays.seriesNonfinite[i * T + t] ? ", NaN or infinite" : "";
  return (least === most ? number(mean) : `${number(mean)} (${number(least)} to ${number(most)})`) + broken;
}
