// Two outputs of the array: their weights of two tiles, TILE_IN products of each in a cycle, and their sums.
//
// PACKED: both share the multipliers (WP486): x * (low + 2^18 high). Four of these have the first sum in their low 18 bits,
// since |x * low| is at most 2^14, and the second, less the borrow of the first, above.
// LATENCY, in cycles: from `read_at` to the products' inputs 2, the cascade 6, taking apart and
// adding 2, the accumulator 1: 11 from read_at to `sums` (m3vit_experts.sv counts them).
module m3vit_pair #(
    parameter int TILE_IN = 16,
    parameter int W_BITS = 8,
    parameter int A_BITS = 8,
    parameter int PORT_BITS = 128,
    parameter int DEPTH = 64,      // words of one
    parameter int PACKED = 1,
    parameter STYLE = "block",
    parameter int SUM_BITS = 48,
    localparam int ADDRESS = DEPTH > 1 ? $clog2(DEPTH) : 1,
    localparam int STEP = TILE_IN * W_BITS,  // bits of a step's weights
    localparam int BANKS = STEP / PORT_BITS  // memories of a word each, for an output
) (
    input  logic                       clk,
    input  logic [        2*BANKS-1:0] write,     // bank b of output o: bit o * BANKS + b
    input  logic [        ADDRESS-1:0] write_at,
    input  logic [PORT_BITS-1:0] data,
    input  logic [        ADDRESS-1:0] read_at,
    input  logic [ TILE_IN*A_BITS-1:0] x,         // skewed
    input  logic                       add,       // the products, to
    input  logic                       first,     // nothing
    input  logic                       last,      // and hold the result in
    output logic [     2*SUM_BITS-1:0] sums
);
    localparam int QUADS = TILE_IN / 4;
    localparam int LOW = 18;

    logic [2*STEP-1:0] y, skewed;
    for (genvar o = 0; o < 2; o++) begin : output_
        logic [BANKS*PORT_BITS-1:0] words;
        for (genvar b = 0; b < BANKS; b++) begin : bank
            m3vit_ram #(
                .WIDTH(PORT_BITS),
                .DEPTH(DEPTH),
                .STYLE(STYLE)
            ) tile (
                .clk(clk),
                .write(write[o*BANKS+b]),
                .write_at(write_at),
                .data(data),
                .read_at(read_at),
                .word(words[b*PORT_BITS+:PORT_BITS])
            );
        end
        always_ff @(posedge clk) y[o*STEP+:STEP] <= words;
        m3vit_skew #(
            .BITS (W_BITS),
            .COUNT(TILE_IN)
        ) skew (
            .clk(clk),
            .in(y[o*STEP+:STEP]),
            .out(skewed[o*STEP+:STEP])
        );
    end

    logic signed [SUM_BITS-1:0] total[0:1];  // of a step
    if (PACKED != 0) begin : packed_
        localparam int PAIR = LOW + W_BITS + 1;
        localparam int BITS = A_BITS + PAIR + 2;
        logic signed [LOW-1:0] low[0:QUADS-1];
        logic signed [BITS-LOW-1:0] high[0:QUADS-1];
        for (genvar q = 0; q < QUADS; q++) begin : quad
            logic [4*PAIR-1:0] pairs;
            logic signed [BITS-1:0] joined;
            for (genvar i = 0; i < 4; i++) begin : pair
                logic signed [W_BITS-1:0] first_, second;
                logic signed [W_BITS:0] above;
                assign first_ = skewed[(4*q+i)*W_BITS+:W_BITS];
                assign second = skewed[STEP+(4*q+i)*W_BITS+:W_BITS];
                assign above = second - $signed({1'b0, first_[W_BITS-1]});  // the borrow of a negative first
                assign pairs[i*PAIR+:PAIR] = {above, {(LOW - W_BITS) {first_[W_BITS-1]}}, first_};
            end
            m3vit_products #(
                .X_BITS(A_BITS),
                .Y_BITS(PAIR),
                .SUM_BITS(BITS)
            ) products (
                .clk(clk),
                .x(x[4*q*A_BITS+:4*A_BITS]),
                .y(pairs),
                .sum(joined)
            );
            always_ff @(posedge clk) begin
                low[q] <= joined[LOW-1:0];
                high[q] <= $signed(joined[BITS-1:LOW]) + (BITS - LOW)'(joined[LOW-1]);
            end
        end
        always_ff @(posedge clk) begin
            logic signed [SUM_BITS-1:0] all_low, all_high;
            all_low = 0;
            all_high = 0;
            for (int q = 0; q < QUADS; q++) begin
                all_low = all_low + SUM_BITS'(low[q]);
                all_high = all_high + SUM_BITS'(high[q]);
            end
            total[0] <= all_low;
            total[1] <= all_high;
        end
    end else begin : single
        localparam int BITS = A_BITS + W_BITS + 2;
        for (genvar o = 0; o < 2; o++) begin : output_
            logic signed [BITS-1:0] part[0:QUADS-1];
            for (genvar q = 0; q < QUADS; q++) begin : quad
                logic signed [BITS-1:0] joined;
                m3vit_products #(
                    .X_BITS(A_BITS),
                    .Y_BITS(W_BITS),
                    .SUM_BITS(BITS)
                ) products (
                    .clk(clk),
                    .x(x[4*q*A_BITS+:4*A_BITS]),
                    .y(skewed[o*STEP+4*q*W_BITS+:4*W_BITS]),
                    .sum(joined)
                );
                always_ff @(posedge clk) part[q] <= joined;
            end
            always_ff @(posedge clk) begin
                logic signed [SUM_BITS-1:0] all;
                all = 0;
                for (int q = 0; q < QUADS; q++) all = all + SUM_BITS'(part[q]);
                total[o] <= all;
            end
        end
    end

    for (genvar o = 0; o < 2; o++) begin : accumulator
        logic signed [SUM_BITS-1:0] sum, next;
        assign next = (first ? 0 : sum) + (add ? total[o] : 0);
        always_ff @(posedge clk) begin
            sum <= next;
            if (last) sums[o*SUM_BITS+:SUM_BITS] <= next;
        end
    end
endmodule
