// Colour: magma, which is even in lightness and safe for the common colour blindnesses; dark is much on a light
// page and little on a dark one.

// matplotlib's magma (CC0) at 17 even places.
const MAGMA = [
  0x000004, 0x0a0822, 0x1d1147, 0x36106b, 0x51127c, 0x6a1c81, 0x832681, 0x9c2e7f, 0xb73779,
  0xd0416f, 0xe75263, 0xf56b5c, 0xfc8961, 0xfea772, 0xfec488, 0xfde2a3, 0xfcfdbf,
].map((colour) => [colour >> 16, (colour >> 8) & 255, colour & 255]);

/** Red, green and blue at `at` in [0, 1], 0 being nothing. */
function mapColour(at, isDark) {
  const place = (isDark ? at : 1 - at) * (MAGMA.length - 1);
  const below = Math.min(Math.floor(place), MAGMA.length - 2);
  return MAGMA[below].map((from, c) => Math.round(from + (MAGMA[below + 1][c] - from) * (place - below)));
}

/** Where a value stands between `largest` (1) and `decades` decades below it, or less (0). */
function logPlace(value, largest, decades) {
  if (!(value > 0) || !(largest > 0)) return 0;
  return Math.min(1, Math.max(0, 1 + Math.log10(value / largest) / decades));
}
