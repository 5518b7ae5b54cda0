// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en");

/** A count: 12,345. */
export function count(value) {
  return value === null || value === undefined ? "–" : whole.format(Math.round(value));
}

/** A large count in few characters: 1.2 M. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / (unit === "k" ? 1e3 : size)).toPrecision(3))} ${unit}`;
  }
  return count(value);
}

/** A measured number with four significant digits. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** A mean number of steps: 2.34. */
export function steps(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toFixed(2)));
}

/** Something a second. */
export function rate(value) {
  return value === null || value === undefined ? "–" : value >= 100 ? count(value) : String(Number(value.toPrecision(3)));
}

/** A length of time, in milliseconds: 2.5 s, 4 min 10 s. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

/** A time of day. */
export function clock(ms) {
  return new Date(ms).toLocaleTimeString("en-GB");
}

/** A day: 3 Nov. */
export function day(ms) {
  return new Date(ms).toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

/** A time, with its day unless that is today. */
export function moment(ms) {
  const isToday = new Date(ms).toDateString() === new Date(Date.now()).toDateString();
  return isToday ? clock(ms) : `${day(ms)} ${clock(ms)}`;
}

/** A size in bytes. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

/** One thing or several: 1 step, 2 steps. */
export function plural(value, thing) {
  return `${count(value)} ${thing}${value === 1 ? "" : "s"}`;
}
