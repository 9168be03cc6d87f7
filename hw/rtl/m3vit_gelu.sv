// A result to a narrow value: held to ACT_BITS, with `frac_in` fractional bits; GELU(x) = relu(x) - gap(|x|); the value
// has `frac_out`. gap is interpolated between 1024 entries a 128th apart, each with what the next one has more.
// frac_in is 23 at most, frac_out 22. LATENCY: 10 cycles.
module m3vit_gelu #(
    parameter int ACT_BITS = 8,
    parameter TABLE = "m3vit_gelu_gap.hex"
) (
    input  logic                       clk,
    input  logic signed [        31:0] result,
    input  logic        [         4:0] frac_in,
    input  logic        [         4:0] frac_out,
    output logic signed [ACT_BITS-1:0] value
);
    localparam int FRAC = 23;         // of |x|, in which it is a place in the table with 16 bits behind the point
    localparam int FRACTION = 16;
    localparam int ENTRY = 18;        // bits of an entry (20 of them fractional), and of the next one's difference
    localparam int SLOPE = 14;
    localparam int SIZE = ACT_BITS + FRAC;
    localparam signed [31:0] HIGH = (1 << (ACT_BITS - 1)) - 1;

    (* rom_style = "block" *) logic [ENTRY+SLOPE-1:0] entries[0:1023];
    initial $readmemh(TABLE, entries);

    logic signed [ACT_BITS-1:0] x;
    logic [ACT_BITS-1:0] size;
    logic [SIZE-1:0] place, place_4, place_5, place_6, place_7;  // |x|
    logic negative, negative_3, negative_4, negative_5, negative_6, negative_7;
    logic [ENTRY+SLOPE-1:0] read, entry;
    logic zero_4, zero_5;
    logic signed [SLOPE+FRACTION:0] product;
    logic signed [ENTRY+1:0] gap;
    logic [ENTRY-1:0] entry_6;
    logic zero_6;
    logic signed [SIZE:0] y, z;

    always_ff @(posedge clk) begin
        x <= result > HIGH ? HIGH[ACT_BITS-1:0] : result < -HIGH - 1 ? {1'b1, {(ACT_BITS - 1) {1'b0}}} : result[ACT_BITS-1:0];

        size <= x < 0 ? ACT_BITS'(-x) : x;
        negative <= x < 0;

        place <= SIZE'(size) << (5'(FRAC) - frac_in);
        negative_3 <= negative;

        read <= entries[place[FRACTION+:10]];
        zero_4 <= place[SIZE-1:FRACTION+10] != 0;  // beyond 8 the gap is 0
        place_4 <= place;
        negative_4 <= negative_3;

        entry <= read;
        zero_5 <= zero_4;
        place_5 <= place_4;
        negative_5 <= negative_4;

        product <= $signed(entry[SLOPE-1:0]) * $signed({1'b0, place_5[FRACTION-1:0]});
        entry_6 <= entry[SLOPE+:ENTRY];
        zero_6 <= zero_5;
        place_6 <= place_5;
        negative_6 <= negative_5;

        gap <= zero_6 ? 0 : $signed({2'b0, entry_6}) + (ENTRY + 2)'((product + (1 << (FRACTION - 1))) >>> FRACTION);
        place_7 <= place_6;
        negative_7 <= negative_6;

        y <= (negative_7 ? 0 : $signed({1'b0, place_7})) - (SIZE + 1)'(gap <<< (FRAC - 20));

        z <= (y >>> (5'(FRAC - 1) - frac_out)) + 1;  // twice the value, and half of its last place

        value <= (z >>> 1) > (SIZE + 1)'(HIGH) ? HIGH[ACT_BITS-1:0]
               : (z >>> 1) < -(SIZE + 1)'(HIGH) - 1 ? {1'b1, {(ACT_BITS - 1) {1'b0}}} : z[ACT_BITS:1];
    end
endmodule
